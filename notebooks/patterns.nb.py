# %% [markdown]
# # Which tokens a token reads
#
# This notebook shows thirty ideas for attention over long sequences, and one property of each: on which positions can the output at a position depend? Each picture is computed from the module that is measured, not from its description: the gradient of every output with respect to every input, in float64. A pair is coloured if its gradient is not zero. (A gradient counts as zero below float64's epsilon times the largest gradient of that output. Gradients of tokens that are read are ten orders of magnitude larger, and almost all others are exactly 0.) The left picture is the variant's *rule*, `attention_mask`, if it has one: gradients and rule must agree for every pair.
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
# ## `shifted_windows`: windows that move by half in every other layer
#
# Tokens read each other within windows of $w$ tokens that do not overlap, $S_i=\{j:\lfloor (j-s)/w\rfloor=\lfloor (i-s)/w\rfloor\}$, with a shift $s=0$ in even layers and $s=w/2$ in odd ones. One layer is as narrow as a chunk; because the borders move, each layer extends the context by half a window. ([Liu et al. 2021](https://arxiv.org/abs/2103.14030), arXiv:2103.14030, §3.2.)

# %%
show("shifted_windows")

# %% [markdown]
# ## `image_transformer`: blocks of queries with a common memory
#
# All queries of a block of $b$ tokens read the same memory: the block and the $m$ tokens before it, $S_i=\{j: b\lfloor i/b\rfloor-m\le j\}$ up to the end of the block (and $m$ tokens after it, if not causal). In two dimensions the sequence is written into a grid row by row, and blocks and memories are rectangles, so that a token reads what is above it as well as what is beside it. ([Parmar et al. 2018](https://arxiv.org/abs/1802.05751), arXiv:1802.05751.)

# %%
show("image_transformer")

# %% [markdown]
# ## `axial`: rows of a grid, then its columns
#
# The sequence is written into a grid with rows of $r\approx\sqrt T$ tokens. Even layers read along rows, odd layers along columns, $S_i=\{j:j\equiv i \pmod r\}$: about $T\sqrt T$ pairs, and two layers connect any two positions. A causal row layer also reads the row above, because rows that are only causal could never pass anything to the left. ([Ho et al. 2019](https://arxiv.org/abs/1912.12180), arXiv:1912.12180.)

# %%
show("axial")

# %% [markdown]
# ## `bigbird`: neighbours, global blocks and random blocks
#
# Tokens are divided into blocks. A block reads its neighbours, a few *global* blocks that everyone reads, and $r$ random blocks that differ by layer and head: $S_i=\text{window}\cup\text{global}\cup\text{random}(i)$, a constant number of keys for each token. Random edges make the graph of blocks an expander: few layers connect everything. In a causal model random blocks lie in the past, and the picture of three layers is nearly full. ([Zaheer et al. 2020](https://arxiv.org/abs/2007.14062), arXiv:2007.14062, §2.)

# %%
show("bigbird")

# %% [markdown]
# ## `light_conv`: a convolution with few weights
#
# No scores at all: $y_i=\sum_{d<k} \mathrm{softmax}(w_h)_d\, v_{i-d}$, with the same $k$ weights $w_h$ for all positions and for all channels of a head. The set that is read is that of a window of $k$ tokens, and the cost is $T\cdot k$ with a very small constant. ([Wu et al. 2019](https://arxiv.org/abs/1901.10430), arXiv:1901.10430.)

# %%
show("light_conv")

# %% [markdown]
# ## `dynamic_conv`: a convolution whose weights depend on the token
#
# As `light_conv`, but the weights are a linear map of the current token, $w_h=W_h x_i$. Unlike attention, they do not depend on what the other tokens contain: a token decides only by itself how far back it looks, within $k$ positions. ([Wu et al. 2019](https://arxiv.org/abs/1901.10430), arXiv:1901.10430.)

# %%
show("dynamic_conv")

# %% [markdown]
# ## `memory_compressed`: keys and values made shorter by a convolution
#
# A convolution with kernel and stride $s$ turns every $s$ tokens into one key and one value, so a query reads $T/s$ of them: $T^2/s$ pairs, still quadratic but with less memory. In a causal model, query $i$ reads pool $j$ only if it is complete, $(j+1)s\le i$; the stairs in the picture are these borders. ([Liu et al. 2018](https://arxiv.org/abs/1801.10198), arXiv:1801.10198, §4.2.4.)

# %%
show("memory_compressed")

# %% [markdown]
# ## `adaptive_span`: every head learns how far it looks
#
# The weight of a key at distance $\Delta$ is multiplied by a soft mask $m_z(\Delta)=\min(\max((R+z-\Delta)/R,0),1)$, where $z$ is learnt for each head and a penalty makes it small. Only keys inside the longest learnt span are computed. The picture shows an untrained layer, whose spans are short: $S_i=\{j:i-j<z+R\}$. ([Sukhbaatar et al. 2019](https://arxiv.org/abs/1905.07799), arXiv:1905.07799, §2.2.)

# %%
show("adaptive_span")

# %% [markdown]
# ## `entmax`: weights that are exactly zero
#
# All scores are computed, but softmax is replaced by $\alpha$-entmax, $p_j=[(\alpha-1)s_j-\tau]_+^{1/(\alpha-1)}$ with the $\tau$ for which the weights sum to 1. Small scores get the weight 0 exactly, so the output depends on few tokens, though none of the $T^2$ scores is saved. The picture shows how many tokens a random layer reads. ([Correia et al. 2019](https://arxiv.org/abs/1909.00015), arXiv:1909.00015, §3.)

# %%
show("entmax")

# %% [markdown]
# ## `sinkhorn`: blocks that are sorted by relevance
#
# A small network scores every block against every other from a summary of each, and a (nearly) doubly stochastic matrix $R$ mixes the blocks: $K'=RK$. A query reads its own block and the mixture that was sorted to its place, $2b$ keys. A causal matrix is strictly lower triangular and its summaries contain only the past; rows are normalised over past blocks. ([Tay et al. 2020](https://arxiv.org/abs/2002.11296), arXiv:2002.11296.)

# %%
show("sinkhorn")

# %% [markdown]
# ## `linear_transformer`: sums in place of a softmax
#
# With $\varphi(x)=\mathrm{elu}(x)+1$ the weight of a pair is $\varphi(q_i)\cdot\varphi(k_j)$, so that the sums over keys $\sum_j\varphi(k_j)v_j^\top$ are computed once for all queries, at a cost of $T\cdot D^2$; in a causal model they grow token by token, like the state of a recurrent network. All tokens are read, none of them sharply. ([Katharopoulos et al. 2020](https://arxiv.org/abs/2006.16236), arXiv:2006.16236, §3.)

# %%
show("linear_transformer")

# %% [markdown]
# ## `rfa`: sines and cosines as features
#
# Queries and keys of length 1 have random Fourier features, $\varphi(x)=[\sin(\omega x),\cos(\omega x)]$, whose products estimate a Gaussian kernel, which for unit vectors is the softmax kernel. A learnt gate $g_t$ can make the sums forget: $S_t=g_tS_{t-1}+(1-g_t)\varphi(k_t)v_t^\top$. All tokens so far are read. ([Peng et al. 2021](https://arxiv.org/abs/2103.02143), arXiv:2103.02143.)

# %%
show("rfa")

# %% [markdown]
# ## `long_short`: a window and a summary of each segment
#
# One softmax covers two kinds of keys: those of a window, and $r$ rows into which each segment is projected with weights that depend on its content, $P=\mathrm{softmax}(XW)$ and $\bar K=P^\top K$. In a causal model only complete segments of the past are projected. The cost is $T\cdot(w+r\,T/s)$, and the picture shows the window and everything up to the last complete segment. ([Zhu et al. 2021](https://arxiv.org/abs/2107.02192), arXiv:2107.02192.)

# %%
show("long_short")

# %% [markdown]
# ## `luna`: two short attentions through a packed sequence
#
# A learnt sequence $P$ of $l$ positions first reads all tokens (*pack*), then all tokens read the packed sequence (*unpack*): $Y=\mathrm{softmax}(X P'^\top)P'$ with $P'=\mathrm{softmax}(P X^\top)X$, at a cost of $T\cdot l$. The causal form replaces the softmax over time by running sums. Every token is read, through $l$ numbers a channel. ([Ma et al. 2021](https://arxiv.org/abs/2106.01540), arXiv:2106.01540.)

# %%
show("luna")

# %% [markdown]
# ## `nystrom`: a matrix of weights from a few landmarks
#
# The matrix of attention weights is approximated from $m$ landmark queries and keys, the means of segments: $\mathrm{softmax}(Q\tilde K^\top)\,\mathrm{softmax}(\tilde Q\tilde K^\top)^{+}\,\mathrm{softmax}(\tilde QK^\top)V$. The pseudo-inverse is computed by a short iteration. Landmarks and inverse mix all positions, so there is no causal form. ([Xiong et al. 2021](https://arxiv.org/abs/2102.03902), arXiv:2102.03902.)

# %%
show("nystrom")

# %% [markdown]
# ## `isab`: learnt points between the tokens
#
# Attention through $m$ learnt points $I$: $H=\mathrm{MAB}(I,X)$ reads all tokens into the points, and $Y=\mathrm{MAB}(X,H)$ lets all tokens read them, $T\cdot m$ pairs each way. It was proposed for sets; because every point reads every token, there is no causal form. ([Lee et al. 2019](https://arxiv.org/abs/1810.00825), arXiv:1810.00825, §3.1.)

# %%
show("isab")

# %% [markdown]
# ## `synthesizer`: weights without a comparison
#
# The scores of token $i$ do not depend on the other tokens: they are a function of $x_i$ alone, $s_i=W_2\,\mathrm{relu}(W_1x_i)$ (dense), or learnt parameters $R_{ij}$ that depend on the positions only (random, and factorised as a product of two thin matrices). The set read is that of dense attention, and the parameters fix the maximum length $T$. ([Tay et al. 2020](https://arxiv.org/abs/2005.00743), arXiv:2005.00743.)

# %%
show("synthesizer")

# %% [markdown]
# ## `fnet`: a Fourier transform in place of attention
#
# No parameters mix the tokens: $y=\mathrm{Re}(\mathcal F_T\,\mathcal F_C\,x)$, a Fourier transform along the sequence and one along the channels, at a cost of $T\log T$. Each output is a fixed mixture of all tokens, so there is no causal form. ([Lee-Thorp et al. 2021](https://arxiv.org/abs/2105.03824), arXiv:2105.03824.)

# %%
show("fnet")

# %% [markdown]
# ## `clustered`: queries that ask together
#
# Queries are hashed to bits and clustered by $k$-means in Hamming space; each of the $c$ clusters asks once, with its mean query, so that $T\cdot c$ scores are computed. The improved form then computes the exact scores of every query with the $k$ keys that its cluster weights most, $S_i=\text{top}_k$, and leaves the other weights as they are. All tokens are read, most of them with a weight that the whole cluster shares. A mean contains later queries, so there is no causal form. ([Vyas et al. 2020](https://arxiv.org/abs/2007.04825), arXiv:2007.04825, §3.)

# %%
show("clustered")

# %% [markdown]
# ## `etc`: a window and learnt global tokens
#
# Besides the tokens of the sequence there are $n$ global tokens with their own inputs and projections. They first read everything and each other, $H=\mathrm{attend}(G,[X,G])$; then each token reads its window and these $n$ results in one softmax, $S_i=\{j:|i-j|<w\}\cup\{1,\dots,n\}$, at a cost of $T\cdot(w+n)$. A global token reads later tokens, so there is no causal form, and through it one layer connects all pairs. ([Ainslie et al. 2020](https://arxiv.org/abs/2004.08483), arXiv:2004.08483.)

# %%
show("etc")

# %% [markdown]
# ## `cluster_former`: windows, then chunks of similar tokens
#
# Even layers have a sliding window. Before an odd layer the tokens are assigned to $k$-means centroids of their hidden states, sorted by cluster and cut into chunks of $c$ tokens, $S_i=\{j:\lfloor\pi(j)/c\rfloor=\lfloor\pi(i)/c\rfloor\}$ for the sorted places $\pi$, so that similar tokens meet wherever they are. The chunks depend on all tokens, so there is no causal form (`routing` is the causal relative). ([Wang et al. 2020](https://arxiv.org/abs/2009.06097), arXiv:2009.06097.)

# %%
show("cluster_former")

# %% [markdown]
# ## `poolingformer`: a window, then a larger one of pools
#
# A second level of attention follows the first: a query reads its window of $w_1$ tokens, and then keys and values that are pooled over $\xi$ tokens within a larger window of $w_2$ tokens, so that it reaches $w_2$ tokens back with $w_1+w_2/\xi$ keys. In a causal model only complete pools of the past are read. ([Zhang et al. 2021](https://arxiv.org/abs/2105.04371), arXiv:2105.04371.)

# %%
show("poolingformer")

# %% [markdown]
# ## `streaming_llm`: a window, and the first tokens
#
# Models that read a window lose their fluency once the first tokens leave it, because heads that have nothing to read put their weight on these. So the first $s$ tokens are kept beside the window: $S_i=\{j:i-j<w\}\cup\{j<s\}$, at a cost of $T\cdot(w+s)$. ([Xiao et al. 2023](https://arxiv.org/abs/2309.17453), arXiv:2309.17453.)

# %%
show("streaming_llm")

# %% [markdown]
# ## `learnt_sink`: a number in place of a token to rest on
#
# The denominator of the softmax has one more term, a learnt number for each head: $p_{ij}=e^{s_{ij}}/(e^{\sigma}+\sum_k e^{s_{ik}})$. A head can then read nothing without a token to rest on. The set that is read is that of dense attention or, as here, of a window. ([OpenAI 2025](https://arxiv.org/abs/2508.10925), arXiv:2508.10925.)

# %%
show("learnt_sink")

# %% [markdown]
# ## `gated_attention`: a gate on what attention returns
#
# Dense attention, whose outputs are multiplied by a sigmoid of the token before the last projection, $y=W_o(\sigma(W_gx)\odot\mathrm{attention}(x))$. All tokens are read; the gate decides how much of it is written. ([Qiu et al. 2025](https://arxiv.org/abs/2505.06708), arXiv:2505.06708.)

# %%
show("gated_attention")

# %% [markdown]
# ## `differential`: the difference of two softmax maps
#
# Two heads are one: $(\mathrm{softmax}(Q_1K_1^\top)-\lambda\,\mathrm{softmax}(Q_2K_2^\top))V$, with a learnt $\lambda$. What both maps have in common, such as weight on tokens without meaning, is cancelled. All tokens are read. ([Ye et al. 2024](https://arxiv.org/abs/2410.05258), arXiv:2410.05258.)

# %%
show("differential")

# %% [markdown]
# ## `forgetting`: scores that fall with every forgotten token
#
# Every token has a forget gate $f_l$ for each head, and the score of a pair falls by the gates between the two: $s_{ij}+\sum_{j<l\le i}\log f_l$. All tokens so far are read, and a head decides by content how fast their weights fall. ([Lin et al. 2025](https://arxiv.org/abs/2503.02130), arXiv:2503.02130.)

# %%
show("forgetting")

# %% [markdown]
# ## `latent_attention`: keys and values from one small vector
#
# Keys and values of all heads are linear maps of one vector $c_j$ of each token, and only this vector and a small key with rotary positions are kept while a text is generated. In training nothing is cheaper, and all tokens are read. ([DeepSeek-AI 2024](https://arxiv.org/abs/2405.04434), arXiv:2405.04434.)

# %%
show("latent_attention")

# %% [markdown]
# ## `moba`: blocks that each query selects
#
# A query reads its own block, and the past blocks whose mean key agrees best with it: $S_i=\mathrm{block}(i)\cup\mathrm{top}_{k-1}\{b: q_i\cdot\bar k_b\}$. The means of its own and of later blocks are no candidates, or they would tell of later tokens. The cost is $T\cdot k\cdot b$, and $T^2/b$ for the means. ([Lu et al. 2025](https://arxiv.org/abs/2502.13189), arXiv:2502.13189.)

# %%
show("moba")

# %% [markdown]
# ## `landmark`: a learnt key for each block
#
# A query reads its own block, and the past blocks whose landmark has the largest scores. The softmax is grouped: keys of the own block and landmarks $g_b$ share one, and the weight of a landmark is divided among the keys of its block, $w_{ij}=w_{i,g_b}\cdot\mathrm{softmax}_{j\in b}(q_i\cdot k_j)$, so that training also learns which block to select. ([Mohtashami and Jaggi 2023](https://arxiv.org/abs/2305.16300), arXiv:2305.16300.)

# %%
show("landmark")

# %% [markdown]
# ## `dsa`: tokens that an indexer selects
#
# A few small heads score every earlier token, $I_{ts}=\sum_j w_{tj}\,\mathrm{ReLU}(q^I_{tj}\cdot k^I_s)$, and all heads of attention read the $k$ tokens with the largest scores. The indexer learns from an auxiliary loss alone, which draws its scores towards the weights of attention over the chosen tokens. ([DeepSeek-AI 2025](https://arxiv.org/abs/2512.02556), arXiv:2512.02556.)

# %%
show("dsa")

# %% [markdown]
# ## `nsa`: coarse, selected and near keys
#
# Three softmax attentions are added, $y=\sum_b\sigma(g_b)\,\mathrm{attention}_b(x)$: over compressed keys of all complete blocks of the past, over the few blocks with the largest compressed weights, and over a window. The first and the own block are always among the selected ones. ([Yuan et al. 2025](https://arxiv.org/abs/2502.11089), arXiv:2502.11089.)

# %%
show("nsa")

# %% [markdown]
# ## `retnet`: a sum that forgets at a fixed rate
#
# Linear attention without a normaliser, whose sum decays by a fixed factor of each head: $S_t=\gamma S_{t-1}+k_tv_t^\top$, $y_t=q_tS_t$. All tokens so far are read, with weights that fall by $\gamma$ with every step. ([Sun et al. 2023](https://arxiv.org/abs/2307.08621), arXiv:2307.08621.)

# %%
show("retnet")

# %% [markdown]
# ## `lightning`: a decay by head and layer
#
# As `retnet`, with silu of queries, keys and values, $S_t=\lambda S_{t-1}+\mathrm{silu}(k_t)\,\mathrm{silu}(v_t)^\top$, one normalisation for all heads, and decays that grow weaker from layer to layer; MiniMax-01 has one layer of full attention after seven of these. ([Qin et al. 2024](https://arxiv.org/abs/2401.04658), arXiv:2401.04658.)

# %%
show("lightning")

# %% [markdown]
# ## `gla`: a decay for each channel, chosen by the token
#
# Linear attention whose sum decays by a factor of each channel, which every token computes: $S_t=\mathrm{Diag}(\alpha_t)S_{t-1}+k_tv_t^\top$. A head forgets some of what it holds and keeps the rest. ([Yang et al. 2023](https://arxiv.org/abs/2312.06635), arXiv:2312.06635.)

# %%
show("gla")

# %% [markdown]
# ## `mamba2`: a state space model as linear attention
#
# With $C$, $B$ and $x$ for queries, keys and values, a state space with one decay for each head and token is a gated sum: $S_t=a_tS_{t-1}+\Delta_tB_tx_t^\top$, $y_t=C_tS_t+Dx_t$, after a short convolution. ([Dao and Gu 2024](https://arxiv.org/abs/2405.21060), arXiv:2405.21060.)

# %%
show("mamba2")

# %% [markdown]
# ## `based`: features of a Taylor series
#
# $\varphi(x)=[1,x,x^2/\sqrt2]$ of few channels makes $\varphi(q)\cdot\varphi(k)$ the Taylor series of $e^{q\cdot k}$ up to the second order. The paper alternates such layers with windows, as `hybrid` can. ([Arora et al. 2024](https://arxiv.org/abs/2402.18668), arXiv:2402.18668.)

# %%
show("based")

# %% [markdown]
# ## `delta_net`: a sum that is corrected
#
# Before a value is added for a key, what the sum already holds for that key is taken out: $S_t=S_{t-1}+\beta_tk_t(v_t-S_{t-1}^\top k_t)^\top$. A key that comes again overwrites its value instead of adding to it. All tokens so far are read through a $D\times D$ matrix for each head. ([Yang et al. 2024](https://arxiv.org/abs/2406.06484), arXiv:2406.06484.)

# %%
show("delta_net")

# %% [markdown]
# ## `gated_delta_net`: a sum that is corrected, and forgets
#
# The delta rule with a decay that each token chooses, $S_t=\alpha_t(I-\beta_tk_tk_t^\top)S_{t-1}+\beta_tk_tv_t^\top$: the sum can be emptied at once, which the delta rule alone cannot do. ([Yang et al. 2024](https://arxiv.org/abs/2412.06464), arXiv:2412.06464.)

# %%
show("gated_delta_net")

# %% [markdown]
# ## `kda`: a decay for each channel
#
# As `gated_delta_net`, with a decay for each channel of the keys, $S_t=(I-\beta_tk_tk_t^\top)\,\mathrm{Diag}(\alpha_t)S_{t-1}+\beta_tk_tv_t^\top$, so that a head forgets some of what it holds and keeps the rest. ([Kimi Team 2025](https://arxiv.org/abs/2510.26692), arXiv:2510.26692.)

# %%
show("kda")

# %% [markdown]
# ## `infini`: a segment, and a sum over all before it
#
# A token reads its segment by softmax, and all earlier segments through a sum as in linear attention, $y=\sigma(\beta)\,\varphi(q)M/\varphi(q)z+(1-\sigma(\beta))\,\mathrm{softmax}(QK^\top)V$, which is read before the segment is added; a gate of each head mixes the two. The picture shows the segments, and the past through the sum. ([Munkhdalai et al. 2024](https://arxiv.org/abs/2404.07143), arXiv:2404.07143.)

# %%
show("infini")

# %% [markdown]
# ## `memorizing`: the nearest keys of the past
#
# A token reads its segment, and of a long memory of earlier keys and values the $k$ with the largest scores, found by an exact search; a gate of each head mixes the two. No gradient reaches the memory (in the picture it does). ([Wu et al. 2022](https://arxiv.org/abs/2203.08913), arXiv:2203.08913.)

# %%
show("memorizing")

# %% [markdown]
# ## `block_recurrent`: state vectors that read each block
#
# A token reads the last $W$ tokens, and $S$ state vectors that have read the blocks before its own. At the end of a block the vectors read each other and the tokens of the block, and a gate keeps a part of the old, $s\leftarrow g\odot s+(1-g)\odot z$. The picture shows the window, and all earlier blocks through the vectors. ([Hutchins et al. 2022](https://arxiv.org/abs/2203.07852), arXiv:2203.07852.)

# %%
show("block_recurrent")

# %% [markdown]
# ## `sparse_qkv`: dense attention with few parameters
#
# Queries, keys and values are convolutions of one layer, $y_{s,m}=\sum_i x_i D_{s,i}E_{m,i}$, with $S$ modules of $M$ channels, which has $C(S+M)$ parameters instead of $C^2$: a decoded token reads fewer bytes. A convolution also reads the tokens before its own; all earlier ones are in the picture anyway, and in a bidirectional model all. ([Jaszczur et al. 2021](https://arxiv.org/abs/2111.12763), arXiv:2111.12763.)

# %%
show("sparse_qkv")

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
