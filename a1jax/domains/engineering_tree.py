"""The solution tree of the engineering domain and the tools that change or show it; pure functions (tree, arguments) -> (tree, text).

Nodes are programs: roots were written whole, children are patches of their parent. Nothing is ever deleted; a dead end is marked.
"""

from __future__ import annotations

import dataclasses

from .base import tool

TOOLS = (
    tool("write_full_code", "Write a whole program: a new root of the tree, and the current node.", code="string"),
    tool("patch_code", "Replace one place in the current node's program: a child, and the current node.", find="string", replace="string"),
    tool("execute_code", "Run the current node: its score, and the first check it does not pass."),
    tool("list_nodes", "List the nodes: parent, score, state."),
    tool("select_node", "Make a node the current one.", node="integer"),
    tool("invalidate_node", "Mark a node as a dead end.", node="integer"),
    tool("update_answer", "Make a node the answer; it must have run without an error.", node="integer"),
    tool("get_current_answer", "Show which node is the answer."),
    tool("write_notes", "Add a note; notes outlive the conversation.", text="string"),
    tool("read_notes", "Read the notes."),
)
MAX_NODES, MAX_NOTES, NOTE_CHARS, LISTED = 1000, 100, 500, 50


class WrongCall(ValueError):
    """A call that the tree refuses; the message is one line for the model to read."""


@dataclasses.dataclass(frozen=True)
class Node:
    """A program. parent: 0 for a root. passed: checks it passed when it was run, -1: it was not run, or ended in an error."""

    parent: int
    code: str
    passed: int = -1
    run: bool = False
    valid: bool = True


@dataclasses.dataclass(frozen=True)
class Tree:
    """Nodes are numbered from 1; current and answer are such numbers, 0: none. checks: how many the task has."""

    checks: int
    nodes: tuple[Node, ...] = ()
    current: int = 0
    answer: int = 0
    notes: tuple[str, ...] = ()

    def node(self, number: int) -> Node:
        if not 1 <= number <= len(self.nodes):
            raise WrongCall(f"there is no such node; there are {len(self.nodes)}")
        return self.nodes[number - 1]

    def living(self, number: int) -> Node:
        if not self.node(number).valid:
            raise WrongCall(f"node {number} is a dead end")
        return self.node(number)

    def changed(self, number: int, **fields) -> Tree:
        node = dataclasses.replace(self.nodes[number - 1], **fields)
        return dataclasses.replace(self, nodes=(*self.nodes[: number - 1], node, *self.nodes[number:]))

    def current_node(self) -> Node:
        if not self.current:
            raise WrongCall("there is no current node; use write_full_code or select_node")
        return self.nodes[self.current - 1]


def grow(tree: Tree, parent: int, code: str, code_chars: int) -> tuple[Tree, str]:
    """A new node, which becomes the current one."""
    if len(code) > code_chars:
        raise WrongCall(f"the program would have {len(code)} characters; at most {code_chars}")
    if len(tree.nodes) >= MAX_NODES:
        raise WrongCall(f"the tree is full: {MAX_NODES} nodes")
    number = len(tree.nodes) + 1
    return dataclasses.replace(tree, nodes=(*tree.nodes, Node(parent, code)), current=number), f"node {number}"


def patched(tree: Tree, find: str, replace: str) -> str:
    """The current node's program with one place replaced."""
    code = tree.current_node().code
    times = code.count(find) if find else 0
    if times != 1:
        raise WrongCall(f"find must occur once in node {tree.current}, it occurs {times} times")
    return code.replace(find, replace)


def list_nodes(tree: Tree) -> tuple[Tree, str]:
    lines = []
    for i, node in enumerate(tree.nodes, 1):
        how = f"score {node.passed}/{tree.checks}" if node.passed >= 0 else "error" if node.run else "not run"
        words = {"dead end": not node.valid, "current": i == tree.current, "answer": i == tree.answer}
        lines.append(
            ", ".join([f"{i} from {node.parent}" if node.parent else f"{i} root", how, *(w for w, holds in words.items() if holds)])
        )
    return tree, "\n".join(lines[-LISTED:]) or "no nodes"


def select_node(tree: Tree, node: int) -> tuple[Tree, str]:
    tree.living(node)
    return dataclasses.replace(tree, current=node), f"node {node}"


def invalidate_node(tree: Tree, node: int) -> tuple[Tree, str]:
    tree.node(node)
    if node == tree.answer:
        raise WrongCall(f"node {node} is the answer; use update_answer first")
    current = 0 if tree.current == node else tree.current
    return dataclasses.replace(tree.changed(node, valid=False), current=current), f"node {node} dead end"


def update_answer(tree: Tree, node: int) -> tuple[Tree, str]:
    if tree.living(node).passed < 0:
        raise WrongCall(f"node {node} " + ("ended in an error" if tree.node(node).run else "was not run"))
    return dataclasses.replace(tree, answer=node), f"answer node {node}"


def get_current_answer(tree: Tree) -> tuple[Tree, str]:
    if not tree.answer:
        return tree, "no answer yet"
    return tree, f"answer node {tree.answer} score {tree.node(tree.answer).passed}/{tree.checks}"


def write_notes(tree: Tree, text: str) -> tuple[Tree, str]:
    if len(text) > NOTE_CHARS:
        raise WrongCall(f"a note has at most {NOTE_CHARS} characters, this one {len(text)}")
    if len(tree.notes) >= MAX_NOTES:
        raise WrongCall(f"there are {MAX_NOTES} notes already")
    text = text.encode("utf-8", "replace").decode("utf-8")  # half a surrogate pair could not be tokenized when it is read
    return dataclasses.replace(tree, notes=(*tree.notes, text)), "noted"


def read_notes(tree: Tree) -> tuple[Tree, str]:
    return tree, "\n".join(tree.notes) or "no notes"


PLAIN = {f.__name__: f for f in (list_nodes, select_node, invalidate_node, update_answer, get_current_answer, write_notes, read_notes)}
