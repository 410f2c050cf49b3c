"""Writes one self-contained HTML page of training runs and their samples, and prints what they measured."""

import argparse
import json

from dit_jax.cli.main import path_flag

HELP = "writes one HTML page of training runs and their samples"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the verb's flags."""
    parser.add_argument(
        "--workdir",
        type=path_flag,
        action="append",
        required=True,
        metavar="DIR",
        help="of a run; give it again for further runs",
    )
    parser.add_argument("--samples", type=path_flag, metavar="DIR", help="what `dit-jax sample --output` wrote")
    parser.add_argument("--output", type=path_flag, default="report.html", metavar="FILE", help="default: %(default)s")
    parser.add_argument(
        "--charts", type=path_flag, metavar="DIR", help="also write the charts of held-out metrics there, as SVG"
    )
    parser.add_argument("--json", action="store_true", help="print the figures as JSON")


def run(args: argparse.Namespace) -> None:
    """Writes the page, then prints the figures."""
    from dit_jax.evaluation.report import figure_lines, write_report

    figures = write_report(args.workdir, args.samples, args.output, args.charts)
    if args.json:
        print(json.dumps(figures))
        return
    lines = list(figure_lines(figures))
    widths = [max(len(line[column]) for line in lines) for column in range(2)]
    for name, figure, value in lines:
        print(f"{name:<{widths[0]}}  {figure:<{widths[1]}}  {value}")
    print(args.output)
