# %% [markdown]
# # Which tokens a token reads
#
# Ten ideas about attention over long sequences, seen from one side: which positions can one position's output depend on? Each picture is drawn from the module that is measured, not from its description. Gradients of every output with respect to every input are taken in float64; a pair is coloured where there is one. (Zero means less than float64's epsilon times the largest gradient of that output. What is read lies ten orders of magnitude above it, and nearly everything else is exactly 0.) Left is the variant's *rule*, `pattern`, where it has one: gradients and rule must agree pair by pair.
#
# A row is a token that reads, a column one that it may read. Windows and chunks are far smaller here than anybody would use, so that 64 tokens show them; the sizes stand in `configs/gallery.yaml`. `make gallery` writes all of these as PNG and SVG.
#
# In the formulas, $q_i$, $k_j$, $v_j$ are the query, key and value of a head at positions $i$ and $j$, of $D$ channels; $T$ is the number of tokens. Nearly all variants compute
#
# $$y_i=\sum_{j\in S_i} a_{ij}\,v_j,\qquad a_{ij}=\frac{\exp(q_i\cdot k_j/\sqrt D)}{\sum_{l\in S_i}\exp(q_i\cdot k_l/\sqrt D)}$$
#
# and differ in the set $S_i$ of positions that $i$ reads. That is what the pictures show.

# %%
# %matplotlib inline

import pandas as pd
import torch
from IPython.display import display

import variants
from bench.report.figures import canvas
from bench.tools.gallery import draw, reads
from bench.tools.gallery.sheet import sheet

torch.set_num_threads(1)
sizes = reads.Sizes.configured(inputs=4)
gallery = list(reads.pictures(sizes))
shown = set()


def show(name):
    """All pictures of a variant."""
    shown.add(name)
    for picture in gallery:
        if picture.variant == name:
            with canvas.look():
                display(draw.figure(picture, sizes, variants.names()))


with canvas.look():
    display(sheet(gallery, sizes, variants.names()))

# %% [markdown]
# ## `dense`: every token
#
# The baseline reads everything, or where it must not look ahead everything so far: $S_i=\{1,\dots,T\}$, causally $S_i=\{1,\dots,i\}$. The number of pairs grows as $T^2$, and so does the time. ([Vaswani et al. 2017](https://arxiv.org/abs/1706.03762), arXiv:1706.03762.)

# %%
show("dense")

# %% [markdown]
# ## `chunked`: the sequence cut into pieces
#
# What most pipelines do with a document that is too long: cut it into chunks of $c$ tokens and run the whole network on each, $S_i=\{j:\lfloor j/c\rfloor=\lfloor i/c\rfloor\}$. The number of pairs is $T\cdot c$. No depth helps: the picture of three layers is that of one, because a chunk never meets another. The first token of each chunk knows nothing. (An engineering baseline.)

# %%
show("chunked")

# %% [markdown]
# ## `overlapping`: chunks that overlap by half
#
# A chunk starts every $c/2$ tokens, and each token is predicted from the one chunk that shows it most: causally from the second half of its chunk, so that at least $c/2$ tokens of history are in view; in both directions from the middle half. Every token goes through the network twice, so the price is $2\,T\cdot c$. Still, depth does not help: windows overlap, but each runs through all layers by itself. (An engineering baseline.)

# %%
show("overlapping")

# %% [markdown]
# ## `longformer`: a sliding window
#
# Each token reads its neighbours, $S_i=\{j:|i-j|<w\}$, causally those behind it: $T\cdot w$ pairs. Here depth *does* help: $L$ layers reach $L\,(w-1)$ tokens, the lighter shades below. Two refinements of the paper: with *dilation* $d$ some heads read every $d$-th token and look $d$ times as far; and *global* tokens, at the sequence's start, read all and are read by all, so that two layers connect everything. They see the future and so have no causal form. ([Beltagy et al. 2020](https://arxiv.org/abs/2004.05150), arXiv:2004.05150, §3.1.)

# %%
show("longformer")

# %% [markdown]
# ## `sparse_strided`: the last few, and every $l$-th
#
# Write the sequence as a matrix with rows of $l\approx\sqrt T$ tokens. A token reads the $l$ before it and the column above it: $S_i=\{j: i-j\le l\}\cup\{j:(i-j)\bmod l=0\}$. That is about $2\sqrt T$ keys a token, $T\sqrt T$ pairs, and two layers connect any two positions: along the column, then along the row. ([Child et al. 2019](https://arxiv.org/abs/1904.10509), arXiv:1904.10509, §4.3.)

# %%
show("sparse_strided")

# %% [markdown]
# ## `sparse_fixed`: blocks, and a summary of each
#
# For text, whose structure has no period, the same paper has another pattern. A token reads its own block of $l$ tokens, and the last $c$ positions of every block before it, which have to summarise their blocks: $S_i=\{j:\lfloor j/l\rfloor=\lfloor i/l\rfloor\}\cup\{j: j\bmod l\ge l-c\}$. Again $T\sqrt T$ pairs for $l\approx\sqrt T$, and again two layers connect everything, but all that comes from afar passes through the summaries. ([Child et al. 2019](https://arxiv.org/abs/1904.10509), arXiv:1904.10509, §4.3.)

# %%
show("sparse_fixed")

# %% [markdown]
# ## `transformer_xl`: a memory of the segment before
#
# The sequence comes in segments of $s$ tokens. Each layer keeps the hidden states of the last $m$ positions and reads them with the segment: for a token $i$ of a segment that starts at $b$, $S_i=\{b-m,\dots,i\}$. Keys are at relative positions, so the score has four terms,
#
# $$q_i\cdot k_j+q_i\cdot W_r R_{i-j}+u\cdot k_j+v\cdot W_r R_{i-j},$$
#
# with $R$ sinusoids of the distance, $u$ and $v$ learnt. Depth adds $m$ tokens a layer. The memory is *detached*: it is read, as the picture shows (gradients were let through for it), but nothing is learnt through it. ([Dai et al. 2019](https://arxiv.org/abs/1901.02860), arXiv:1901.02860, §3.)

# %%
show("transformer_xl")

# %% [markdown]
# ## `compressive`: and a compressed one of what is older
#
# What falls out of that memory is not thrown away: $c$ hidden states become one, $\mathrm{new}=f_c(h_{1},\dots,h_{c})$ with $f_c$ a mean, a maximum or (here) a convolution, and go to a second memory of $m_c$ places. So a query looks back $m+c\cdot m_c$ positions at the price of $m+m_c$ keys, the older ones out of focus. The compression learns from a loss of its own, to keep what attention would have read. ([Rae et al. 2019](https://arxiv.org/abs/1911.05507), arXiv:1911.05507, §3.)

# %%
show("compressive")

# %% [markdown]
# ## `reformer`: whoever hashes alike
#
# Softmax is dominated by the largest scores, so look for those alone. Queries and keys are one projection; random rotations $R$ hash each to a bucket, $h(x)=\arg\max[xR;-xR]$, several times; and a token reads the nearest tokens that share a bucket with it: $S_i=\bigcup_r\{j:h_r(q_i)=h_r(q_j),\ j\text{ near }i\}$. Sorting by bucket costs $T\log T$. There is no rule to draw: left is what one random input reads, then the mean over several. ([Kitaev et al. 2020](https://arxiv.org/abs/2001.04451), arXiv:2001.04451, §2.)
#
# What *chooses* has no gradient, so pictures such as this cannot show whether a later token changes an earlier one's choice. The paper's own neighbourhood (`neighbourhood=chunk`) leaks in that way; the default here (`band`) does not, and the causality gate checks it by changing tokens.

# %%
show("reformer")

# %% [markdown]
# ## `routing`: whoever is in the same cluster
#
# Half of the heads read a window. The others keep $\sqrt T$ centroids $\mu$, learnt by spherical $k$-means as training goes, and read their own cluster: $S_i=\{j:\arg\max_c\,\mu_c\cdot x_j=\arg\max_c\,\mu_c\cdot x_i\}$, of about $\sqrt T$ members, so $T\sqrt T$ pairs. The band along the diagonal is the local heads, the haze the clusters. In both directions each centroid takes the tokens nearest to it (the paper's way, which would see the future if it were causal); causally each token joins its nearest centroid. ([Roy et al. 2020](https://arxiv.org/abs/2003.05997), arXiv:2003.05997, §4.)

# %%
show("routing")

# %% [markdown]
# ## `linformer`: all of them, through $k$ mixtures
#
# If the matrix of weights is close to low rank, $k$ keys will do: learnt matrices $E,F\in\mathbb R^{k\times T}$ mix the positions, and
#
# $$y=\mathrm{softmax}\!\left(\frac{Q\,(EK)^\top}{\sqrt D}\right)FV$$
#
# costs $T\cdot k$. The picture is full, and that is the limit of such pictures: every token is read, though only $k$ mixtures of them are. Mixing all positions, it has no causal form, and $E$, $F$ fix the longest length. ([Wang et al. 2020](https://arxiv.org/abs/2006.04768), arXiv:2006.04768.)

# %%
show("linformer")

# %% [markdown]
# ## `performer`: all of them, through random features
#
# The softmax kernel is the mean of a product of features, $\exp(q\cdot k)=\mathbb E_\omega\,[\varphi_\omega(q)\,\varphi_\omega(k)]$ with $\varphi_\omega(x)=\exp(\omega\cdot x-|x|^2/2)$ and normal $\omega$. With $m$ draws of $\omega$ in a vector $\varphi$, sums over keys can be taken once for all queries:
#
# $$y_i=\frac{\varphi(q_i)\cdot\sum_{j\in S_i}\varphi(k_j)\,v_j^\top}{\varphi(q_i)\cdot\sum_{j\in S_i}\varphi(k_j)}$$
#
# at a cost of $T\cdot m\cdot D$; causally the sums run along. Everything is read here too, with weights that are estimates. ([Choromanski et al. 2020](https://arxiv.org/abs/2009.14794), arXiv:2009.14794, §2.)

# %%
show("performer")

# %% [markdown]
# ## Yours
#
# A variant of another package, or a new file in `variants/`, is drawn as it stands, with its default knobs or those that `configs/gallery.yaml` gives it. What no section above has shown follows here.

# %%
for name in variants.mixers():
    if name not in shown:
        print(name, "·", variants.load(name).info.paper)
        show(name)

# %% [markdown]
# And in figures: the share of pairs that are read through one layer and through all of them, and how far back the last token looks. `bench.evaluate.receptive_field` works the same out from rules alone.

# %%
def looks_back(panel):
    """Tokens from the last one to the farthest that any input had it read."""
    return len(panel.share) - 1 - int((panel.share[-1] > 0).int().argmax())


rows = [
    {
        "variant": picture.variant,
        "knobs": draw.words(picture),
        "pairs, 1 layer": f"{direction.panels[0].share.mean():.1%}",
        f"pairs, {sizes.layers} layers": f"{direction.panels[-1].share.mean():.1%}",
        "looks back, 1 layer": looks_back(direction.panels[0]),
        f"looks back, {sizes.layers} layers": looks_back(direction.panels[-1]),
    }
    for picture in gallery
    for direction in picture.directions
    if direction.panels and direction.causal
]
pd.DataFrame(rows).set_index("variant")
