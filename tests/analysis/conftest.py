"""Pages are read by a strict reader: every tag that is opened is closed, in order, and nothing is fetched from elsewhere."""

from html.parser import HTMLParser

import pytest

VOID = {"meta", "img", "br", "hr", "link"}


class Page(HTMLParser):
    def __init__(self, text):
        super().__init__(convert_charrefs=True)
        self.open, self.tags, self.addresses, self.words = [], [], [], []
        self.within, self.classed = [], []  # classes of the elements that are open; (classes of the innermost, text) in order
        self.feed(text)
        self.close()
        assert self.open == [], f"never closed: {self.open}"

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.addresses += [value for name, value in attributes if name in ("src", "href")]
        if tag not in VOID:
            self.open.append(tag)
            self.within.append(dict(attributes).get("class") or "")

    def handle_endtag(self, tag):
        assert self.open and self.open[-1] == tag, f"</{tag}> inside {self.open[-3:]}"
        self.open.pop()
        self.within.pop()

    def handle_data(self, data):
        if "style" not in self.open:
            self.words.append(data)
            self.classed.append((self.within[-1] if self.within else "", data))

    @property
    def text(self):
        return "".join(self.words)


@pytest.fixture()
def read_page():
    """read_page(text) -> tags, addresses and text of a page that is well formed and self-contained."""

    def read(text):
        found = Page(text)
        assert not [a for a in found.addresses if "//" in a.partition(",")[0]] and "@import" not in text
        assert "script" not in found.tags
        return found

    return read
