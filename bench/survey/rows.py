"""Table 1 of Tay et al. 2020, Efficient Transformers: A Survey (arXiv:2009.06732v3), row by row.

Complexities are as printed there: N is the length, B a block, m a memory block, k a size that does not grow,
N_c a compressed length, N_g the number of global tokens. The arXiv number is that of the model's paper. It
is the paper that the row cites, except that Perceiver cites Perceiver IO (arXiv:2107.14795), and Performer an
earlier paper, on proteins (arXiv:2006.03555).
"""

from __future__ import annotations

from dataclasses import dataclass

SOURCE = "Tay et al. 2020, Efficient Transformers: A Survey, arXiv:2009.06732v3, Table 1"
CLASSES = {
    "FP": "fixed patterns or combinations of them",
    "M": "memory",
    "LP": "learnable patterns",
    "LR": "low rank",
    "KR": "kernels",
    "RC": "recurrence",
    "DS": "downsampling",
    "Sparse": "sparse models",
}
"""The abbreviations of the classes."""
_EXPERTS = "a mixture of experts: feed_forward=switch and top_k; its attention is dense"


@dataclass(frozen=True)
class Row:
    """One row. A variant belongs to it if its paper has the row's arXiv number."""

    model: str
    cited: str
    complexity: str
    decodes: bool
    """The column "Decode"."""
    classes: str
    arxiv: str
    why_none: str = ""
    """Why no variant here is this model."""


ROWS = (
    Row("Memory Compressed", "Liu et al. 2018", "N_c²", True, "FP+M", "1801.10198"),
    Row("Image Transformer", "Parmar et al. 2018", "N·m", True, "FP", "1802.05751"),
    Row("Set Transformer", "Lee et al. 2019", "k·N", False, "M", "1810.00825"),
    Row("Transformer-XL", "Dai et al. 2019", "N²", True, "RC", "1901.02860"),
    Row("Sparse Transformer", "Child et al. 2019", "N·√N", True, "FP", "1904.10509"),
    Row("Reformer", "Kitaev et al. 2020", "N·log N", True, "LP", "2001.04451"),
    Row("Routing Transformer", "Roy et al. 2020", "N·√N", True, "LP", "2003.05997"),
    Row("Axial Transformer", "Ho et al. 2019", "N·√N", True, "FP", "1912.12180"),
    Row("Compressive Transformer", "Rae et al. 2020", "N²", True, "RC", "1911.05507"),
    Row("Sinkhorn Transformer", "Tay et al. 2020", "B²", True, "LP", "2002.11296"),
    Row("Longformer", "Beltagy et al. 2020", "N·(k+m)", True, "FP+M", "2004.05150"),
    Row("ETC", "Ainslie et al. 2020", "N_g² + N·N_g", False, "FP+M", "2004.08483"),
    Row("Synthesizer", "Tay et al. 2020", "N²", True, "LR+LP", "2005.00743"),
    Row("Performer", "Choromanski et al. 2020", "N", True, "KR", "2009.14794"),
    Row(
        *("Funnel Transformer", "Dai et al. 2020", "N²", True, "FP+DS", "2006.03236"),
        "a depth schedule, whose blocks in the middle see fewer tokens: stack=funnel",
    ),
    Row("Linformer", "Wang et al. 2020", "N", False, "LR", "2006.04768"),
    Row("Linear Transformers", "Katharopoulos et al. 2020", "N", True, "KR", "2006.16236"),
    Row("Big Bird", "Zaheer et al. 2020", "N", False, "FP+M", "2007.14062"),
    Row("Random Feature Attention", "Peng et al. 2021", "N", True, "KR", "2103.02143"),
    Row("Long Short Transformers", "Zhu et al. 2021", "k·N", True, "FP+LR", "2107.02192"),
    Row("Poolingformer", "Zhang et al. 2021", "N", False, "FP+M", "2105.04371"),
    Row("Nyströmformer", "Xiong et al. 2021", "k·N", False, "M+DS", "2102.03902"),
    Row(
        *("Perceiver", "Jaegle et al. 2021", "k·N", True, "M+DS", "2103.03206"),
        "depth schedules, whose blocks see latents: stack=perceiver_io, and perceiver_ar where causal",
    ),
    Row("Clusterformer", "Wang et al. 2020", "N·log N", False, "LP", "2009.06097"),
    Row("Luna", "Ma et al. 2021", "k·N", True, "M", "2106.01540"),
    Row(
        *("TokenLearner", "Ryoo et al. 2021", "k²", False, "DS", "2106.11297"),
        "a depth schedule, whose later blocks see learnt tokens: stack=token_learner",
    ),
    Row("Adaptive Sparse Transformer", "Correia et al. 2019", "N²", True, "Sparse", "1909.00015"),
    Row(
        *("Product Key Memory", "Lample et al. 2019", "N²", True, "Sparse", "1907.05242"),
        "a memory in place of feed-forward layers: feed_forward=product_keys; its attention is dense",
    ),
    Row("Switch Transformer", "Fedus et al. 2021", "N²", True, "Sparse", "2101.03961", _EXPERTS),
    Row("ST-MoE", "Zoph et al. 2022", "N²", True, "Sparse", "2202.08906", _EXPERTS),
    Row("GShard", "Lepikhin et al. 2020", "N²", True, "Sparse", "2006.16668", _EXPERTS),
    Row("Scaling Transformers", "Jaszczur et al. 2021", "N²", True, "Sparse", "2111.12763"),
    Row("GLaM", "Du et al. 2021", "N²", True, "Sparse", "2112.06905", _EXPERTS),
)
