# %% [markdown]
# # Which tokens a token reads
#
# This notebook shows ten ideas for attention over long sequences, and one property of each: on which positions can the output at a position depend? Each picture is computed from the module that is measured, not from its description: the gradient of every output with respect to every input, in float64. A pair is coloured if its gradient is not zero. (A gradient counts as zero below float64's epsilon times the largest gradient of that output. Gradients of tokens that are read are ten orders of magnitude larger, and almost all others are exactly 0.) The left picture is the variant's *rule*, `attention_mask`, if it has one: gradients and rule must agree for every pair.
#
# A row is a token that reads, a column is a token that it may read. Windows and chunks are much smaller than in practice, so that they are visible with 64 tokens; `configs/gallery.yaml` contains the sizes. `make gallery` writes all pictures as PNG and SVG.
#
# In the formulas, $q_i$, $k_j$, $v_j$ are the query, key and value of a head at positions $i$ and $j$, of $D$ channels; $T$ is the number of tokens. Nearly all variants compute
#
# $$y_i=\sum_{j\in S_i} a_{ij}\,v_j,\qquad a_{ij}=\frac{\exp(q_i\cdot k_j/\sqrt D)}{\sum_{l\in S_i}\exp(q_i\cdot k_l/\sqrt D)}$$
#
# and differ in the set $S_i$ of positions that $i$ reads. The pictures show this set.

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
    """Show all pictures of a variant."""
    shown.add(name)
    for picture in gallery:
        if picture.variant == name:
            with canvas.look():
                display(draw.figure(picture, sizes))


with canvas.look():
    display(sheet(gallery, sizes))

# %% [markdown]
# ## `dense`: every token
#
# The baseline reads all tokens, $S_i=\{1,\dots,T\}$, or in a causal model all tokens so far, $S_i=\{1,\dots,i\}$. The number of pairs grows as $T^2$, and so does the time. ([Vaswani et al. 2017](https://arxiv.org/abs/1706.03762), arXiv:1706.03762.)

# %%
show("dense")

# %% [markdown]
# ## `chunked`: the sequence is divided into chunks
#
# This is how most pipelines process a document that is too long: they divide it into chunks of $c$ tokens and run the whole network on each, $S_i=\{j:\lfloor j/c\rfloor=\lfloor i/c\rfloor\}$. The number of pairs is $T\cdot c$. More layers do not extend the context: the picture of three layers equals that of one, because chunks never interact. The first token of each chunk has no context. (An engineering baseline.)

# %%
show("chunked")

# %% [markdown]
# ## `overlapping`: chunks that overlap by half
#
# A chunk starts every $c/2$ tokens, and each token is predicted from the chunk that gives it the most context. In a causal model this is the chunk that has the token in its second half, so that at least $c/2$ earlier tokens are visible; in a bidirectional model it is the chunk that has the token in its middle half. Every token passes through the network twice, so the cost is $2\,T\cdot c$. More layers do not extend the context either: chunks overlap, but each passes through all layers separately. (An engineering baseline.)

# %%
show("overlapping")

# %% [markdown]
# ## `longformer`: a sliding window
#
# Each token reads its neighbours, $S_i=\{j:|i-j|<w\}$, in a causal model only the earlier ones: $T\cdot w$ pairs. Here more layers *do* extend the context: $L$ layers reach $L\,(w-1)$ tokens, shown in lighter shades. The paper has two extensions. With *dilation* $d$ some heads read every $d$-th token and reach $d$ times as far. *Global* tokens at the start of the sequence read all tokens and are read by all, so that two layers connect all pairs; they read later tokens, so they have no causal form. ([Beltagy et al. 2020](https://arxiv.org/abs/2004.05150), arXiv:2004.05150, §3.1.)

# %%
show("longformer")

# %% [markdown]
# ## `sparse_strided`: the last tokens, and every $l$-th token
#
# Write the sequence as a matrix with rows of $l\approx\sqrt T$ tokens. A token reads the $l$ tokens before it and the column above it: $S_i=\{j: i-j\le l\}\cup\{j:(i-j)\bmod l=0\}$. These are about $2\sqrt T$ keys for each token and $T\sqrt T$ pairs. Two layers connect any two positions: one along the column, the other along the row. ([Child et al. 2019](https://arxiv.org/abs/1904.10509), arXiv:1904.10509, §4.3.)

# %%
show("sparse_strided")

# %% [markdown]
# ## `sparse_fixed`: blocks, and a summary of each
#
# For text, which is not periodic, the same paper has another mask. A token reads its own block of $l$ tokens, and the last $c$ positions of every block before it, which must summarise their blocks: $S_i=\{j:\lfloor j/l\rfloor=\lfloor i/l\rfloor\}\cup\{j: j\bmod l\ge l-c\}$. Again $T\sqrt T$ pairs for $l\approx\sqrt T$, and again two layers connect all positions, but all information from other blocks passes through the summaries. ([Child et al. 2019](https://arxiv.org/abs/1904.10509), arXiv:1904.10509, §4.3.)

# %%
show("sparse_fixed")

# %% [markdown]
# ## `transformer_xl`: a memory of the previous segment
#
# The sequence is processed in segments of $s$ tokens. Each layer keeps the hidden states of the last $m$ positions and reads them with the segment: for a token $i$ of a segment that starts at $b$, $S_i=\{b-m,\dots,i\}$. Positions are relative, so the score has four terms,
#
# $$q_i\cdot k_j+q_i\cdot W_r R_{i-j}+u\cdot k_j+v\cdot W_r R_{i-j},$$
#
# where $R$ are sinusoids of the distance, and $u$ and $v$ are learnt. Each layer extends the context by $m$ tokens. The memory is *detached*: it is read, as the picture shows (only for the picture, gradients pass through it), but in training no gradient passes through it. ([Dai et al. 2019](https://arxiv.org/abs/1901.02860), arXiv:1901.02860, §3.)

# %%
show("transformer_xl")

# %% [markdown]
# ## `compressive`: a second, compressed memory of older tokens
#
# Hidden states that leave the first memory are compressed, not dropped: $c$ of them become one, $\mathrm{new}=f_c(h_{1},\dots,h_{c})$, where $f_c$ is a mean, a maximum or (here) a convolution. The results are stored in a second memory of $m_c$ entries. So a query reaches $m+c\cdot m_c$ positions back with only $m+m_c$ keys, of which the older ones are less precise. A separate loss trains the compression to preserve the information that attention would have read. ([Rae et al. 2019](https://arxiv.org/abs/1911.05507), arXiv:1911.05507, §3.)

# %%
show("compressive")

# %% [markdown]
# ## `reformer`: tokens with the same hash
#
# The largest scores dominate the softmax, so it is sufficient to find these. Queries and keys share one projection. Random rotations $R$ hash each token to a bucket, $h(x)=\arg\max[xR;-xR]$, in several rounds. A token reads the nearest tokens in its buckets: $S_i=\bigcup_r\{j:h_r(q_i)=h_r(q_j),\ j\text{ near }i\}$. Sorting by bucket costs $T\log T$. There is no rule to draw: the left picture shows one random input, the next ones the mean over several inputs. ([Kitaev et al. 2020](https://arxiv.org/abs/2001.04451), arXiv:2001.04451, §2.)
#
# The *selection* of tokens has no gradient, so such a picture cannot show whether a later token changes the selection of an earlier one. The neighbourhood of the paper (`neighbourhood=chunk`) leaks in this way. The default here (`band`) does not; the causality gate checks this by changing tokens.

# %%
show("reformer")

# %% [markdown]
# ## `routing`: tokens in the same cluster
#
# Half of the heads read a window. The others have $\sqrt T$ centroids $\mu$, which spherical $k$-means learns during training, and read their own cluster: $S_i=\{j:\arg\max_c\,\mu_c\cdot x_j=\arg\max_c\,\mu_c\cdot x_i\}$, of about $\sqrt T$ members, so $T\sqrt T$ pairs. In the picture, the band along the diagonal belongs to the local heads, and the scattered pairs to the clusters. In a bidirectional model each centroid selects its nearest tokens, as in the paper; a causal model would read later tokens in this way, so there each token selects its nearest centroid. ([Roy et al. 2020](https://arxiv.org/abs/2003.05997), arXiv:2003.05997, §4.)

# %%
show("routing")

# %% [markdown]
# ## `linformer`: all tokens, through $k$ mixtures
#
# If the matrix of attention weights has approximately a low rank, $k$ keys are sufficient: learnt matrices $E,F\in\mathbb R^{k\times T}$ mix the positions, and
#
# $$y=\mathrm{softmax}\!\left(\frac{Q\,(EK)^\top}{\sqrt D}\right)FV$$
#
# costs $T\cdot k$. The picture is full, which shows the limit of such pictures: every token is read, but only through $k$ mixtures. Because it mixes all positions, it has no causal form, and $E$ and $F$ fix the maximum length. ([Wang et al. 2020](https://arxiv.org/abs/2006.04768), arXiv:2006.04768.)

# %%
show("linformer")

# %% [markdown]
# ## `performer`: all tokens, through random features
#
# The softmax kernel is the mean of a product of features, $\exp(q\cdot k)=\mathbb E_\omega\,[\varphi_\omega(q)\,\varphi_\omega(k)]$ with $\varphi_\omega(x)=\exp(\omega\cdot x-|x|^2/2)$ and normal $\omega$. With $m$ samples of $\omega$ in a vector $\varphi$, the sums over keys are computed once for all queries:
#
# $$y_i=\frac{\varphi(q_i)\cdot\sum_{j\in S_i}\varphi(k_j)\,v_j^\top}{\varphi(q_i)\cdot\sum_{j\in S_i}\varphi(k_j)}$$
#
# at a cost of $T\cdot m\cdot D$; in a causal model the sums are cumulative. All tokens are read here too, with estimated weights. ([Choromanski et al. 2020](https://arxiv.org/abs/2009.14794), arXiv:2009.14794, §2.)

# %%
show("performer")

# %% [markdown]
# ## Your variant
#
# A variant of another package, or a new file in `variants/attention/`, is also drawn, with the knobs in `configs/gallery.yaml` or with its defaults, made smaller. The next cell shows all variants without a section above.

# %%
for name in variants.mixers():
    if name not in shown:
        print(name, "·", variants.load(name).info.paper)
        show(name)

# %% [markdown]
# The same as numbers: the share of pairs that are read through one layer and through all layers, and the distance that the last token reaches back. `bench.evaluate.receptive_field` computes these figures from the rules alone.

# %%
def looks_back(panel):
    """Return the distance from the last token to the farthest token that it reads for any input."""
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
