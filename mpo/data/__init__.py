"""Loading and checking multilingual preference data.

``load_groups`` reads any accepted form, ``split_by_source`` holds sources out, ``check_data`` reports; ``convert`` brings
prompts and pairs in one language, as they are published, into a plain form.
"""

from __future__ import annotations

from mpo.data.check import DataReport, check_data
from mpo.data.contract import RowError, parse_row
from mpo.data.conversion import Conversion, convert
from mpo.data.faults import BadRow
from mpo.data.grouping import fingerprint_groups, group_features
from mpo.data.languages import LANGUAGES, detect_language, language_name, normalize_language
from mpo.data.loading import (
    LoadedGroups,
    as_groups,
    count_kinds,
    load_groups,
    split_by_source,
)

__all__ = [
    "LANGUAGES",
    "BadRow",
    "Conversion",
    "DataReport",
    "LoadedGroups",
    "RowError",
    "as_groups",
    "check_data",
    "convert",
    "count_kinds",
    "detect_language",
    "fingerprint_groups",
    "group_features",
    "language_name",
    "load_groups",
    "normalize_language",
    "parse_row",
    "split_by_source",
]
