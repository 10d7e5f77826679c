"""Plan what a run will take: memory, operations and seconds of every phase of a step, without a GPU or weights.

    python -m vpo_engine.plan [CONFIG.yaml] [key.path=value ...]
    python -m vpo_engine.plan CONFIG.yaml --gpus 8 [--nodes 2]

It also says which setting would make a run fit that does not, and how long clips may be at each resolution. With
--gpus it compares ways to divide the run among several GPUs instead: the memory of a process, what it sends and the
expected time of a step; and it recommends one (see docs/scaling.md).
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from vpo_engine.command import Parser, report_errors, split_words
from vpo_engine.config_file import load_config
from vpo_engine.help_text import HelpFormatter
from vpo_engine.planning.gpus import DEFAULT, GPUS, check_gpu_name, find_gpu, kind_of
from vpo_engine.planning.links import BETWEEN, WITHIN, Cluster, make_cluster


def main(arguments: Sequence[str] | None = None) -> int:
    parser = Parser(
        prog="python -m vpo_engine.plan",
        description=__doc__,
        formatter_class=HelpFormatter,
    )
    parser.add_argument(
        "words",
        nargs="*",
        metavar="CONFIG.yaml | key.path=value",
        help="YAML file, or the name of a shipped one (default: sprites); and settings that replace the file's",
    )
    parser.add_argument("--gpu", help=f"{', '.join(GPUS)}; default: the one that is here, else a100-80g")
    parser.add_argument("--json", action="store_true", help="numbers for machines")
    parser.add_argument(
        "--no-frames",
        action="store_true",
        help="leave out the longest clips that fit at each resolution, which take minutes to find",
    )
    many = parser.add_argument_group("several GPUs")
    many.add_argument("--gpus", type=int, help="GPUs of each machine, as torchrun's --nproc-per-node")
    many.add_argument("--nodes", type=int, help="machines, as torchrun's --nnodes; default: 1")
    many.add_argument("--link", help=f"between the GPUs of a machine: {', '.join(WITHIN)}; default: as usual")
    many.add_argument("--network", help=f"between machines: {', '.join(BETWEEN)}; default: as usual")
    given, unknown = parser.parse_known_intermixed_args(arguments)
    return report_errors(lambda: _plan(given, unknown))


def _plan(given: argparse.Namespace, unknown: Sequence[str]) -> int:
    """Plan as the command line asks; torch is imported after its words have been checked."""
    source, overrides = split_words(given.words, unknown)
    config = load_config(source, overrides)
    check_gpu_name(given.gpu)
    if _cluster(given, DEFAULT) is not None:
        from vpo_engine.planning.answer import print_comparison

        gpu = find_gpu(given.gpu)
        cluster = _cluster(given, kind_of(gpu) or gpu.name)
        assert cluster is not None
        words = [*([] if source is None else [str(source)]), *overrides]
        print_comparison(config, gpu, cluster, given=words, machine=given.json)
        return 0
    from vpo_engine.planning.answer import print_plan

    print_plan(config, find_gpu(given.gpu), frames=not given.no_frames, machine=given.json)
    return 0


def _cluster(given: argparse.Namespace, gpu: str) -> Cluster | None:
    """Return the machines of the command line, of GPUs of kind ``gpu``; None if it asks for one GPU."""
    others = {"--nodes": given.nodes, "--link": given.link, "--network": given.network}
    if given.gpus is None:
        for name, value in others.items():
            if value is not None:
                raise ValueError(
                    f"{name} {value} describes several GPUs; give the GPUs of each machine as --gpus"
                )
        return None
    nodes = 1 if given.nodes is None else given.nodes
    return make_cluster(given.gpus, nodes, gpu, given.link, given.network)


if __name__ == "__main__":
    sys.exit(main())
