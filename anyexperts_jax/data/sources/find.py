"""Finds out which kind of files a path holds, and opens their rows."""

from anyexperts_jax.core.errors import UserError, comma_list, require
from anyexperts_jax.core.registries import ROW_FORMATS, SOURCES
from anyexperts_jax.data.sources.places import find_files
from anyexperts_jax.data.sources.rows import RowFormat, Rows


def find_rows(place: str) -> tuple[str, Rows]:
    """Opens the files at a place, recognised by their names; returns (description, as "JSON Lines, 3 files"; rows).

    Raises:
      UserError: if there are no files, files of several kinds, or none of a known kind.
    """
    found = find_files(place)
    formats: dict[str, RowFormat] = {name: ROW_FORMATS[name] for name in ROW_FORMATS}
    for name, kind in formats.items():
        files = kind.find(found)
        if not files:
            continue
        others = [one.said for other, one in formats.items() if other in _TABLES and other != name and one.find(found)]
        clear = name not in _TABLES or not others
        require(clear, f"{place} holds {kind.said} and {comma_list(others)}; give a pattern, as {place}/*.jsonl")
        rows: Rows = kind.open(files)
        return f"{kind.said}, {len(files)} file" + ("s" if len(files) > 1 else ""), rows
    kinds, shown = comma_list(one.said for one in formats.values()), comma_list(file.name for file in found.files[:3])
    markers = comma_list(f"{SOURCES[name].marker} ({name})" for name in SOURCES)
    raise UserError(f"the data at {place} has neither {markers} nor files of a known kind ({kinds}), but {shown}")


_TABLES = ("lines", "parquet", "webdataset")  # a place may hold only one of these kinds
