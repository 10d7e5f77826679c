"""All tables and figures of OnlineVPO (arXiv 2412.15159) that are made here, as data, by the name of their command.

Every row is a run of configs/sprites_fast.yaml with other settings. VBench's and DEVIL's networks have no weights
here, so each of their measures has a stand-in, which ``columns.STAND_INS`` names.
"""

from __future__ import annotations

from vpo_engine.reproducing.ablations import ABLATIONS
from vpo_engine.reproducing.spec import Table
from vpo_engine.reproducing.tables_of_methods import (
    FIGURE_5,
    LEARNING_RATES,
    OVEROPTIMISATION,
    TABLE_3,
    TABLE_4C,
    TABLE_5C,
)
from vpo_engine.reproducing.tables_of_pairs import TABLE_4A, TABLE_4B, TABLE_4D, TABLE_5A, TABLE_5B

TABLE_2 = Table(
    "table2",
    "Table 2: which scorer finds the preferred one of eight clips",
    "Each clip has each kind of damage with probability 1/2; the preferred clip of a group has the least. MRR and "
    "recall in per cent, with 95 % bootstrap intervals over groups.",
    kind="ranking",
)

FIGURE_7 = Table(
    "figure7",
    "Figure 7: peak memory by resolution and frames",
    "GiB at the peak of a step of STDiT3-XL/2, all weights trained, planned and not measured.",
    kind="memory",
)

TABLES = {
    table.name: table
    for table in (
        TABLE_2,
        TABLE_3,
        TABLE_4A,
        TABLE_4B,
        TABLE_4C,
        TABLE_4D,
        TABLE_5A,
        TABLE_5B,
        TABLE_5C,
        FIGURE_5,
        FIGURE_7,
        OVEROPTIMISATION,
        ABLATIONS,
        LEARNING_RATES,
    )
}
