"""The report of `a1jax compile` for reading: a program at a time, and the table of a sweep."""

from __future__ import annotations

from typing import Any


def bytes_text(n: float) -> str:
    """Bytes with three digits and a unit, decimal."""
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if n >= size:
            return f"{n / size:.4g} {unit}"
    return f"{n:.0f} B"


def program(p: dict[str, Any]) -> str:
    """Everything that was found of one program."""
    verdict = "fits" if p["fits"] else "DOES NOT FIT"
    lines = [f"{p['stage']}: {p['program']}   {p['tokens']:,} tokens a call   compiled in {p['seconds_to_compile']:.0f} s   {verdict}"]
    if p["refused"]:
        lines.append(f"  refused by the compiler: {p['refused']}")
    rows = [("arguments", p["argument_bytes"]), ("temporaries", p["temp_bytes"]), ("outputs", p["output_bytes"])]
    rows += [("of which aliased", p["aliased_bytes"]), ("code", p["code_bytes"])]
    rows += [(f"beside: {name}", n) for name, n in p["beside"].items()]
    rows += [("in the host's memory", p["host_bytes"])] if p["host_bytes"] else []
    rows += [("peak", p["peak_bytes"]), ("HBM", p["hbm_bytes"])]
    lines += ["  bytes per device"] + [f"    {name:44} {bytes_text(n):>12}" for name, n in rows]
    lines += _flops(p) + _exchange(p) + _estimate(p)
    if p["largest_buffers"]:
        lines.append("  largest temporaries (of those that take turns in one place, the largest)")
        lines += [f"    {bytes_text(b['bytes']):>10}  {b['shape']:26} {_tail(b['scope'])}" for b in p["largest_buffers"]]
    lines.append("  largest arguments")
    lines += [f"    {bytes_text(b['bytes']):>10}  {b['shape']:26} {b['name']}" for b in p["largest_arguments"][:5]]
    if p["help"]:
        lines += ["  what would help"] + [f"    {text}" for text in p["help"]]
    return "\n".join(lines)


def everything(found: list[dict[str, Any]]) -> str:
    """All programs, and what the estimates assume."""
    return "\n\n".join([*map(program, found), f"The times are {found[0]['estimate']['assumption']}."])


def _flops(p: dict[str, Any]) -> list[str]:
    f = p["flops"]
    parts = ", ".join(f"{name} {value / 1e9:.4g}" for name, value in sorted(f["parts"].items(), key=lambda item: -item[1]))
    lines = [
        f"  10^9 FLOPs per token by formula {p['flops_per_token'] / 1e9:.4g}: forward {f['forward'] / 1e9:.4g}, "
        f"backward {f['backward'] / 1e9:.4g}; besides, computed again {f['recomputed'] / 1e9:.4g}",
        f"    forward by part: {parts}",
    ]
    if "flops" in p["compiler"]:
        own = p["compiler"]
        lines.append(f"    the compiler's own count: {own['flops']:.4g} per device and call, {own['bytes']:.4g} bytes; {own['note']}")
    return lines


def _exchange(p: dict[str, Any]) -> list[str]:
    loops = f" ({p['unknown_loops']} loops without a known number of trips counted once)" if p["unknown_loops"] else ""
    lines = [f"  bytes through HBM per device and call {bytes_text(p['bytes_moved'])}{loops}"]
    if p["collectives"]:
        lines.append("  collectives per device and call          axes                      count        result          sent")
    for c in p["collectives"]:
        lines.append(f"    {c['kind']:36} {c['axes']:22} {c['count']:9,} {bytes_text(c['bytes']):>13} {bytes_text(c['wire_bytes']):>13}")
    return lines


def _estimate(p: dict[str, Any]) -> list[str]:
    e = p["estimate"]
    times = ", ".join(f"{name} {e[f'{name}_seconds']:.3g}" for name in ("compute", "hbm", "ici"))
    rates = f"{e['tokens_per_second']:,.0f} tokens/s, {e['tokens_per_second_per_chip']:,.0f} a chip"
    return [f"  estimated {e['step_seconds']:.3g} s a call, bound by {e['bound_by']} (seconds: {times}); {rates}"]


def _tail(scope: str, width: int = 100) -> str:
    return scope if len(scope) <= width else "..." + scope[-width:]


def table(found: list[dict[str, Any]]) -> str:
    """A sweep: the fastest first, then what does not fit, then what is impossible with its reason."""
    lines = ["tokens/s a chip   fits   peak GB    HBM GB   bound by   mesh"]
    for f in found:
        shape = " ".join(f"{name}={n}" for name, n in f["mesh"].items()) or "one device"
        if "reason" in f:
            lines.append(f"{'-':>15}   {'-':4} {'-':>9} {'-':>9}   {'-':8}   {shape}: {f['reason']}")
        else:
            numbers = f"{f['peak_bytes'] / 1e9:9.2f} {f['hbm_bytes'] / 1e9:9.2f}   {f['bound_by']:8}"
            lines.append(f"{f['tokens_per_second_per_chip']:15,.0f}   {'yes' if f['fits'] else 'no':4} {numbers}   {shape}")
    return "\n".join(lines)
