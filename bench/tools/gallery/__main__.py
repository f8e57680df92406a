"""`python -m bench.tools.gallery [--out folder]`: pictures of which tokens each token reads, for every
variant.

Exit status: 0 if the pictures are written, 1 if a variant reads other tokens than its mask allows (the
pictures are written nevertheless, with marks), 2 if nothing can be drawn.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from variants.safe_output import run


def main(arguments: Sequence[str] | None = None) -> int:
    """Draw a figure for each picture, then an overview of all; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.tools.gallery",
        description="Draw which tokens each token reads, from gradients of every variant's module. "
        "configs/gallery.yaml contains the sizes and knobs.",
    )
    parser.add_argument("--out", default="results/gallery", help="output folder (default results/gallery)")
    parser.add_argument("--only", nargs="+", metavar="VARIANT", help="draw only these variants")
    options = parser.parse_args(arguments)

    import torch  # imported here, so that --help is fast

    from bench.inputs.paths import user_path
    from bench.report.figures import canvas
    from bench.tools.gallery import draw, reads
    from bench.tools.gallery.sheet import sheet

    torch.set_num_threads(1)  # the tensors are too small for several threads
    sizes = reads.Sizes.configured()
    pictures, wrong = [], []
    try:
        out = user_path("--out", options.out)
        with canvas.look():
            for picture in reads.pictures(sizes, options.only):
                pictures.append(picture)
                name = draw.stem(picture, pictures)
                canvas.save(draw.figure(picture, sizes), out, name)
                wrong += [name] if draw.disagrees(picture) else []
                print(f"{name}.png", flush=True)
            canvas.save(sheet(pictures, sizes), out, "sheet")
    except (ValueError, OSError) as error:
        print(f"bench.tools.gallery: {error}", file=sys.stderr)
        return 2
    print(f"gallery: {out / 'sheet.png'}, {len(pictures)} pictures in the same folder (png, svg)")
    if wrong:
        print(f"bench.tools.gallery: gradients and mask disagree in {', '.join(wrong)}", file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    run(main)
