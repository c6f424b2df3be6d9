"""What the tests ask of a report page: ids, links, figures with theirs, tables cell by cell."""

from __future__ import annotations

from html.parser import HTMLParser

import plotly.offline


def own(html: str) -> str:
    """The page without plotly's own code."""
    code = plotly.offline.get_plotlyjs()
    assert html.count(code) == 1
    return html.replace(code, "")


class Page(HTMLParser):
    """A page read without a browser; `tables` are rows of texts, headings first, by the name of the table.

    `unlinked` are rows of tables without a link.
    """

    def __init__(self, html: str) -> None:
        super().__init__()
        self.ids: list[str] = []
        self.links: list[str] = []
        self.resources: list[str] = []
        self.headings: list[str] = []
        self.figures: list[tuple[str, list[str]]] = []
        self.tables: dict[str, list[list[str]]] = {}
        self.regions: list[dict[str, str | None]] = []
        self.unlinked: list[str] = []
        self._rows: list[list[str]] | None = None
        self._linked = True
        self._figure: list[str] | None = None
        self._text: list[str] | None = None
        self.feed(html)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        found = dict(attributes)
        name = found.get("id") or ""
        if name:
            self.ids.append(name)
        if tag == "div" and name.startswith("table-"):
            self._rows = self.tables.setdefault(name.removeprefix("table-"), [])
        if tag == "div" and found.get("role") == "region":
            self.regions.append(found)
        if tag in ("h1", "h2", "h3"):
            self.headings.append(tag)
        if tag == "figure":
            self._figure = []
            self.figures.append((found.get("aria-label") or "", self._figure))
        elif tag == "a":
            self.links.append(found.get("href") or "")
            self._linked = True
            if self._figure is not None:
                self._figure.append(self.links[-1])
        elif tag in ("script", "link", "img", "iframe"):
            self.resources += [found[key] or "" for key in ("src", "href") if key in found]
        elif tag == "tr" and self._rows is not None:
            self._rows.append([])
            # The headings need no record.
            self._linked = len(self._rows) == 1
        elif tag in ("td", "th") and self._rows is not None:
            self._text = []
        elif tag == "span" and found.get("aria-hidden") == "true" and self._text is not None:
            self._text.append("\0")

    def handle_data(self, data: str) -> None:
        if self._text is not None and self._text[-1:] == ["\0"]:
            self._text[-1] = ""
        elif self._text is not None:
            self._text.append(data)

    def handle_endtag(self, tag: str) -> None:
        if tag in ("td", "th") and self._rows is not None and self._text is not None:
            self._rows[-1].append("".join(self._text))
            self._text = None
        elif tag == "tr" and self._rows is not None and not self._linked:
            self.unlinked.append(" ".join(self._rows[-1]))
        elif tag == "table":
            self._rows = None
        elif tag == "figure":
            self._figure = None
