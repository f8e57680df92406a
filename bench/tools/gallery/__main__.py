"""`python -m bench.tools.gallery [--out folder]`: which tokens a token reads, for every variant, as pictures.

Exit status: 0 when the pictures are written, 1 when a variant reads other tokens than its rule says (they are
written, and marked, all the same), 2 when nothing can be drawn.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from variants.safe_output import run


def main(arguments: Sequence[str] | None = None) -> int:
    """Draw a figure for each picture, then the sheet of all; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.tools.gallery",
        description="Draw which tokens a token reads, from gradients of every variant's module. "
        "Sizes and knobs stand in configs/gallery.yaml.",
    )
    parser.add_argument("--out", default="results/gallery", help="folder (results/gallery)")
    parser.add_argument("--only", nargs="+", metavar="VARIANT", help="these variants instead of all")
    options = parser.parse_args(arguments)

    import torch  # here, so that --help does not wait for it

    import variants
    from bench.inputs.paths import user_path
    from bench.report.figures import canvas
    from bench.tools.gallery import draw, reads
    from bench.tools.gallery.sheet import sheet

    torch.set_num_threads(1)  # work this small is done before a second one wakes
    sizes = reads.Sizes.configured()
    drawn, wrong = [], []
    try:
        out = user_path("--out", options.out)
        with canvas.look():
            for picture in reads.pictures(sizes, options.only):
                drawn.append(picture)
                name = draw.stem(picture, drawn)
                canvas.save(draw.figure(picture, sizes, variants.names()), out, name)
                wrong += [name] if draw.disagrees(picture) else []
                print(f"{name}.png", flush=True)
            canvas.save(sheet(drawn, sizes, variants.names()), out, "sheet")
    except (ValueError, OSError) as error:
        print(f"bench.tools.gallery: {error}", file=sys.stderr)
        return 2
    print(f"gallery: {out / 'sheet.png'}, {len(drawn)} pictures beside it (png, svg)")
    if wrong:
        print(f"bench.tools.gallery: gradients and rule disagree in {', '.join(wrong)}", file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    run(main)
