"""The README and the pages under docs/: the tree is complete, and every page can be reached and leads somewhere."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SOURCE = ROOT / "src" / "ropewalk"
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
LINK = re.compile(r"\]\(([^)\s]+)\)|<img src=\"([^\"]+)\"")


def links(page):
    """The targets within the repository, without what follows a #."""
    targets = (a or b for a, b in LINK.findall(page.read_text(encoding="utf-8")))
    return [target.split("#")[0] for target in targets if not re.match(r"https?:|#|mailto:", target)]


def test_the_tree_in_the_readme_names_every_room_and_every_module_at_the_top():
    tree = PAGES[0].read_text(encoding="utf-8").split("## The tree")[1]
    modules = [path.name for path in SOURCE.glob("*.py") if not path.name.startswith("__")]
    rooms = [f"{path.parent.name}/" for path in SOURCE.glob("*/__init__.py")]
    assert [name for name in modules + rooms if not re.search(rf"(?<![\w/]){re.escape(name)}", tree)] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_link_within_the_repository_leads_somewhere(page):
    assert [link for link in links(page) if not (page.parent / link).exists()] == []


def test_every_page_can_be_reached_from_the_readme():
    reached, waiting = set(), [PAGES[0]]
    while waiting:
        page = waiting.pop()
        if page not in reached:
            reached.add(page)
            waiting += [
                found for link in links(page) if (found := (page.parent / link).resolve()).suffix == ".md" and found.exists()
            ]
    assert [page.name for page in PAGES if page not in reached] == []
