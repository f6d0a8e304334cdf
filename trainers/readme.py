"""The table of papers in the README, from the catalogue: `python -m trainers.readme README.md` renews it."""

import sys
from pathlib import Path

from zoo.catalogue import entries

__all__ = ["START", "STOP", "paper_table"]

START, STOP = "<!-- papers -->", "<!-- /papers -->"


def paper_table() -> str:
    """One Markdown table a room: what works, how faithfully, and what is planned."""
    works = sum(e.status == "works" for e in entries())
    lines = [f"{len(entries())} papers, {works} of them working so far."]
    room = None
    for e in entries():
        if e.room != room:
            room = e.room
            lines += [
                "",
                f"**{room}**",
                "",
                "| paper | title | task | official code | status |",
                "|---|---|---|---|---|",
            ]
        title = f"[{e.title}](https://arxiv.org/abs/{e.arxiv})" if e.arxiv else e.title
        code = f"[{e.code}](https://github.com/{e.code})" if e.code else ""
        name = f"[`{e.slug}`](zoo/{e.room}/{e.slug}.py)" if e.fidelity else f"`{e.slug}`"
        lines.append(f"| {name} | {title} | {e.task.replace('_', ' ')} | {code} | {e.fidelity or 'planned'} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    path = Path(sys.argv[1])
    before, rest = path.read_text().split(START)
    path.write_text(f"{before}{START}\n{paper_table()}{STOP}{rest.split(STOP)[1]}")


if __name__ == "__main__":
    main()
