"""What the shipped classifier finds in a record: a table in the terminal, and a picture with the findings.

    python examples/demo.py [RECORD] [--checkpoint FOLDER] [--output demo.png]

RECORD is a WFDB record of yours. Without one, a record of PTB-XL is fetched from PhysioNet, once; where that cannot be
done, a record is simulated, and said to be.
"""

import argparse
from pathlib import Path

from physionet_record import SOURCE, FetchError, cache_folder, fetch_record

CHECKPOINT = Path(__file__).resolve().parent.parent / "checkpoints" / "anyecg-small-statements"


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("record", nargs="?", help="a WFDB record, with or without suffix")
    parser.add_argument("--record", dest="record_option", metavar="RECORD", help="the same")
    parser.add_argument("--checkpoint", default=str(CHECKPOINT), help="folder or Hub name of a classifier")
    parser.add_argument("--output", default="demo.png", help="where the picture goes")
    args = parser.parse_args(arguments)
    if args.checkpoint == str(CHECKPOINT) and not CHECKPOINT.is_dir():
        parser.exit(1, f"{CHECKPOINT} is absent: name another classifier with --checkpoint.\n")

    from transformers import logging, pipeline  # not above: --help answers at once

    from anyecg_hf.plotting import plot_record

    try:
        record = choose_record(args.record or args.record_option)
    except (OSError, ValueError) as error:
        parser.exit(1, f"{error}\n")
    logging.disable_progress_bar()
    findings = pipeline("ecg-classification", model=args.checkpoint)(record)
    print(table(findings))
    plot_record(record, findings=findings).savefig(args.output)
    print(f"Picture: {Path(args.output).resolve()}")


def choose_record(path):
    """Return the `Record` at `path`; without one, that of PhysioNet; where there is no network, a simulated one."""
    from anyecg_hf import read_record
    from anyecg_hf.simulate import simulate_record

    if path:
        return read_record(path)
    try:
        header = fetch_record(cache_folder())
    except FetchError as error:
        print(f"No record from PhysioNet ({error}): the record below is simulated.")
        return simulate_record(0)
    print(SOURCE)
    return read_record(header)


def table(findings, least=6):
    """Return the positive findings as lines of text, then the highest of the others until there are `least`."""
    ranked = sorted(findings, key=lambda finding: (not finding["positive"], -finding["score"]))
    shown = ranked[: max(least, sum(bool(finding["positive"]) for finding in ranked))]
    width = max([len(finding["label"]) for finding in shown], default=7)
    lines = ["", f"  {'finding':<{width}}  score  threshold"]
    for finding in shown:
        mark = "*" if finding["positive"] else " "
        threshold = "-" if finding["threshold"] is None else f"{finding['threshold']:.2f}"
        lines.append(f"{mark} {finding['label']:<{width}}  {finding['score']:5.2f}  {threshold:>9}")
    return "\n".join([*lines, "* score at or above the threshold. Not a medical device.", ""])


if __name__ == "__main__":
    main()
