"""Dynamic soft contrastive loss: Sec. 4.2-4.3, Eq. 1-10. Copy this file; it needs torch alone.

    criterion = DynamicSoftContrastiveLoss()
    out = criterion(image, text, labels, 1 / temperature,     # unit rows (B, D), labels (B, K)
                    hard_text=hard_text, hard_labels=hard_labels)
    out["loss"].backward()
    print({name: value.item() for name, value in out.items()})

The loss of one ordered pair of modalities is the KL divergence between soft labels, made from the
similarities inside a modality, and the softmax of the similarities across modalities:

    v, T = [T1; T2], C = [C1; C2], G = [G1; G2]   images; reports, their hard negatives after them
    p = softmax(v T^T / temperature)              Eq. 1; Eq. 2 is softmax(T1 v^T / temperature)
    S = T T^T                                     Eq. 3, Eq. 8
    y = (S - tau) / (1 - tau) where S > tau, 0 elsewhere            Eq. 4, Eq. 5, Eq. 9
    y_hat = y with rows that sum to 1
    L = mean over rows of KL(y_hat || p)          Eq. 6, Eq. 7
    total = sum over ordered pairs of w_T L_t + w_C L_c + w_G L_g   Eq. 10

`forward`, `_equations`, `_targets` and `soft_labels` are this list in code. Eq. 10 entry by entry,
without any thought of speed, is `literal_loss` in tests/test_loss.py. SigmoidSoftContrastiveLoss
puts the same soft labels into SigLIP's loss. The plumbing is at the end: checks, ranks, chunks.

Under torch.distributed every rank passes its own rows, in equal numbers. They are compared with the
rows of all ranks, the columns, and the mean of gradients that DistributedDataParallel takes is the
gradient of the loss of the whole batch.

Symbols, in shapes:
    B, N   studies of this rank, and of all ranks: N = world x B
    R, M   rows and columns of texts: B and N; with hard negatives M = 2N, with graphs too R = 2B
    n, m   rows and columns of one pair's logits
    D, K   width of the embeddings, number of labels

SPDX-License-Identifier: MIT
"""

from functools import partial

import torch
import torch.distributed as dist
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

STREAMS = {"text": "text", "clinical": "labels", "graph": "graph"}  # whose rows S compares
PAIRS = (("image", "text"), ("image", "graph"), ("text", "graph"))  # each is taken both ways


class DynamicSoftContrastiveLoss(nn.Module):
    """Eq. 10 over image, text and, where given, graph embeddings.

    w_text, w_clinical, w_graph: w_T, w_C, w_G of Eq. 10, non-negative.
    tau_text, tau_clinical, tau_graph: thresholds of Eq. 4, 5, 9, in [0, 1).
    soft: False gives CLIP: one cross-entropy with one-hot labels per ordered pair, in which case
        weights and thresholds are ignored. It is the sum over pairs, so twice CLIP's usual mean.
    row_chunk: evaluate that many studies at a time, and again in the backward pass: same values
        and gradients, with memory of row_chunk x M instead of M x M.
    Raises ValueError for a setting out of range.
    """

    # ASSUMPTION: thresholds and weights are unpublished; these do well in tests/STUDY.md.
    def __init__(self, w_text=1.0, w_clinical=1.0, w_graph=1.0,
                 tau_text=0.98, tau_clinical=0.5, tau_graph=0.98, soft=True, row_chunk=None):
        super().__init__()
        self.weights = {"text": w_text, "clinical": w_clinical, "graph": w_graph}
        self.thresholds = {"text": tau_text, "clinical": tau_clinical, "graph": tau_graph}
        self.soft, self.row_chunk = soft, row_chunk
        self._values_checked = False
        if not all(0 <= w < float("inf") for w in self.weights.values()):
            raise ValueError(f"weights: expected finite numbers of at least 0, got {self.weights}")
        if not all(0 <= tau < 1 for tau in self.thresholds.values()):
            raise ValueError(f"thresholds: expected numbers in [0, 1), got {self.thresholds}")

    def forward(self, image, text, labels, logit_scale, *, hard_text=None, hard_labels=None,
                graph=None, hard_graph=None):
        """Evaluate the loss of a batch.

        image, text, graph, hard_text, hard_graph: (B, D), unit rows: v, T1, G1, T2, G2.
        labels, hard_labels: (B, K), non-negative, not normalised: C1, C2. Without any labels:
            torch.zeros(B, 1) for both, and w_clinical=0 in the constructor.
        logit_scale: 1 / temperature (`.exp()` of CLIP's parameter), a scalar tensor or a float.
        Returns "loss" (Eq. 10, a scalar) and detached scalars: the share of each ordered pair
        ("image_text", ...), which add up to the loss, and "positives_text", "_clinical", "_graph",
        the effective number of positives exp(entropy) of a row of soft labels, averaged.
        Raises ValueError naming the argument and its shape. Row lengths, signs and other ranks'
        shapes are checked on the CPU always, on CUDA in the first call only, so that no later call
        waits for the device. A row of NaN, infinity or zeros (which F.normalize makes of one
        that overflows) is no error: the loss is not finite, and the step can be skipped.
        """
        inputs = {"image": image, "text": text, "labels": labels, "hard_text": hard_text,
                  "hard_labels": hard_labels, "graph": graph, "hard_graph": hard_graph}
        return _evaluate(self, inputs, logit_scale)

    def _equations(self, rows, columns, scale):
        """Eq. 1-10 of this rank's rows x against the columns X of all ranks; terms are means."""
        x, X = _join(rows), _join(columns)             # v, T = [T1; T2], C = [C1; C2], G = [G1; G2]
        diagonal, w = x["diagonal"], self.weights
        targets, square, positives = self._targets(x, X, scale)
        terms = {}
        for a, b in PAIRS:
            if b not in x:
                continue
            # "we use T1 and G1 instead of T and G when compared with I" (Eq. 10).
            # ASSUMPTION: T1, G1 are rows against I; I->T and I->G keep the 2B columns of Eq. 1.
            # ASSUMPTION: T<->G compares all 2B rows; each KL is the mean over its rows.
            # ASSUMPTION: one temperature serves all pairs.
            z_ab = scale * x[a] @ X[b].T                                      # (n, M)
            if len(x[a]) == len(X[a]):  # one rank, no row_chunk: the same products, turned
                z_ba = z_ab[:, :len(X[a])].T.contiguous()                     # (n, m)
            else:
                z_ba = scale * x[b][:len(x[a])] @ X[a].T                      # (n, m)
            log_p_ab, log_p_ba = z_ab.log_softmax(1), z_ba.log_softmax(1)     # Eq. 1, Eq. 2
            if not self.soft:
                # ASSUMPTION: systems without D have one cross-entropy per ordered pair.
                terms[f"{a}_{b}"] = F.nll_loss(log_p_ab, diagonal[:len(z_ab)])
                terms[f"{b}_{a}"] = F.nll_loss(log_p_ba, diagonal[:len(z_ba)])
                continue
            turned = targets
            if a == "image":
                turned = square
            zero = 0 * scale  # the sum of a batch whose streams have no weight
            # Eq. 6, Eq. 7: KL of each stream's soft labels; Eq. 10: their weighted sum.
            terms[f"{a}_{b}"] = sum((w[k] * kl(*targets[k], log_p_ab) for k in targets), zero)
            terms[f"{b}_{a}"] = sum((w[k] * kl(*turned[k], log_p_ba) for k in targets), zero)
        return {"loss": sum(terms.values()), **terms, **positives}            # Eq. 10

    @torch.no_grad()
    def _targets(self, x, X, scale):
        """By stream: y_hat (R, M) and its square block (B, N), each with the entropies of its rows,
        and the number of positives.
        """
        targets, square = {}, {}
        if not self.soft:
            return targets, square, _one_positive(x)
        positives = {}
        # ASSUMPTION: soft labels carry no gradient.
        for k, S in _similarities(x, X):                                      # (R, M)  Eq. 3, Eq. 8
            y_hat = self._soft_labels(S, k, x["diagonal"], scale)             # (R, M)  Eq. 4, 5, 9
            H = entropy(y_hat)                                                # (R,)
            positives[f"positives_{k}"] = H.exp().mean()
            if self.weights[k] > 0:
                # ASSUMPTION: T1->I and G1->I take the top-left N x N of y, re-normalised.
                block = y_hat[:len(x["image"]), :len(X["image"])]             # (B, N)
                block = F.normalize(block, p=1)                               # (B, N)
                targets[k], square[k] = (y_hat, H), (block, entropy(block))
        return targets, square, positives

    def _soft_labels(self, S, stream, diagonal, scale):
        return soft_labels(S, self.thresholds[stream], diagonal)


def soft_labels(similarity, threshold, diagonal=None):
    """y_hat of Eq. 4, Eq. 5, Eq. 9: similarities above the threshold, stretched; rows sum to 1.

    similarity: S, (n, m), entries in [-1, 1]; (n, n) without `diagonal`.
    threshold: tau in [0, 1).
    diagonal: (n,) the column in which row i is compared with itself; i by default.
    Returns (n, m) without gradient, float32 or float64. Raises ValueError for a threshold
    out of range.
    """
    if not 0 <= threshold < 1:
        raise ValueError(f"threshold: expected a number in [0, 1), got {threshold}")
    if diagonal is None:
        diagonal = torch.arange(len(similarity), device=similarity.device)
    S = similarity.detach().to(torch.promote_types(similarity.dtype, torch.float32))
    return F.normalize(above_threshold(S, threshold, diagonal), p=1)          # (n, m)


def above_threshold(similarity, threshold, diagonal):
    """y of Eq. 4, Eq. 5, Eq. 9 before its rows are normalised; arguments as in `soft_labels`."""
    y = (similarity - threshold).div_(1 - threshold).clamp_(0, 1)             # (n, m)
    # ASSUMPTION: the diagonal is 1 before row normalisation, for rows without labels.
    return y.scatter_(1, diagonal[:, None], 1.0)


def kl(y_hat, H, log_p):
    """KL(y_hat || p) of Eq. 6 and Eq. 7, a mean over rows: the cross-entropy less the entropy.

    H: (R,), the entropies of y_hat's rows, which all pairs share. log_p: (n, m), n <= R.
    """
    n = len(log_p)
    return -torch.dot(y_hat[:n].flatten(), log_p.flatten()) / n - H[:n].mean()


def entropy(y):
    """H of each row: sum of -y log y, 0 at 0; a third of torch.special.entr's time on the CPU."""
    return -y.clamp(min=1e-30).log_().mul_(y).sum(1)


class SoftCLIPLoss(DynamicSoftContrastiveLoss):
    """SoftCLIP's intra-modal targets on the same pairs: y_hat = softmax(S_t / temperature)."""

    # DIFFERS from SoftCLIP: no region features, no disentangled negatives, targets from text alone.

    def __init__(self, row_chunk=None):
        super().__init__(w_clinical=0.0, w_graph=0.0, row_chunk=row_chunk)

    def _soft_labels(self, S, stream, diagonal, scale):
        return (scale * S).softmax(1)                                # (R, M)


class SigmoidSoftContrastiveLoss(DynamicSoftContrastiveLoss):
    """The same soft labels in SigLIP's loss, where each entry is a yes or no of its own.

        z = sim / temperature + bias
        L = (1 / rows) sum_ij sum_k w_k KL(Bernoulli(y_k) || Bernoulli(sigmoid(z)))

    y_k is y of Eq. 4, 5, 9 with diagonal 1, not normalised: rows that sum to 1 would pull true
    duplicates to a probability of 1 / their number. A pair is taken once, not in two directions:
    image_text (N x M), image_graph (N x M), text_graph (M x M); "loss" is their sum, 0 where the
    streams agree and are met. Arguments as above; soft=False is SigLIP, with weight 1.
    """

    # ASSUMPTION: the paper's appendix on other frameworks cannot be had; this one is ours.

    def forward(self, image, text, labels, logit_scale, logit_bias, **others):
        """Evaluate the loss of a batch: arguments, result and checks as in the softmax loss, and

        logit_bias: added to each logit, a scalar tensor or a float; see `initial_bias`.
        others: hard_text, hard_labels, graph, hard_graph.
        Its "positives_text", "_clinical", "_graph" are sums of a row of y, averaged.
        """
        inputs = {"image": image, "text": text, "labels": labels, **others}
        return _evaluate(self, inputs, logit_scale, logit_bias)

    @torch.no_grad()
    def initial_bias(self, text, labels, **others):
        """Where to start logit_bias: at the logit of image_text's mean target, in [-10, -1].

        Takes the first batch as `forward` does, without images. The same on all ranks.
        """
        rows, columns = _prepare(self, {"image": text, "text": text, "labels": labels, **others})
        y = self._mixed_targets(_join(rows), _join(columns))[0][:len(text)]   # (B, M)
        return torch.logit(_mean_of_ranks(y.mean())).clamp(-10, -1).item()

    def _equations(self, rows, columns, scale, bias):
        """The sum of this rank's rows against the columns of all ranks; each term is a mean."""
        x, X = _join(rows), _join(columns)
        y, W, H, positives = self._mixed_targets(x, X)
        terms = {}
        for a, b in PAIRS:
            if b in x:
                z = scale * x[a] @ X[b].T + bias                              # (n, M)
                n = len(z)
                # BCE is linear in y: sum_k w_k BCE(y_k, z) = W BCE(sum_k w_k y_k / W, z)
                bce = F.binary_cross_entropy_with_logits(z, y[:n], reduction="sum")
                terms[f"{a}_{b}"] = (W * bce - H[:n].sum()) / n
        return {"loss": sum(terms.values()), **terms, **positives}

    @torch.no_grad()
    def _mixed_targets(self, x, X):
        """sum_k w_k y_k / W (R, M), W = sum_k w_k, sum_k w_k H(y_k) (R,), row sums of each y_k."""
        mixed = x["text"].new_zeros(len(x["diagonal"]), len(X["text"]))       # (R, M)
        W, H, positives = 0, mixed.sum(1), {}                                 # H (R,)
        if not self.soft:
            return mixed.scatter_(1, x["diagonal"][:, None], 1.0), 1, H, _one_positive(x)
        for k, S in _similarities(x, X):                                      # (R, M)  Eq. 3, Eq. 8
            y = above_threshold(S, self.thresholds[k], x["diagonal"])         # (R, M)  Eq. 4, 5, 9
            positives[f"positives_{k}"] = y.sum(1).mean()
            w = self.weights[k]
            if w > 0:
                mixed += w * y
                H += w * (entropy(y) + entropy(1 - y))
                W += w
        return mixed / max(W, 1e-30), W, H, positives


# ---------------------------------------------------------------- plumbing


def _evaluate(criterion, inputs, *scalars):
    """`forward`, at once or in chunks, on one rank or several."""
    rows, columns = _prepare(criterion, inputs)
    B, image = len(rows["image"]), rows["image"]
    scalars = [torch.as_tensor(x, dtype=image.dtype, device=image.device).reshape(())
               for x in scalars]
    size, values = criterion.row_chunk or B, 0
    with torch.autocast(image.device.type, enabled=False):
        equations = criterion._equations
        if size < B:
            equations = partial(checkpoint, equations, use_reentrant=False)
        for start in range(0, B, size):  # a chunk is a smaller rank
            chunk = {name: x[start:start + size] for name, x in rows.items()}
            terms = equations(chunk, columns, *scalars)
            values = values + len(chunk["image"]) / B * torch.stack(list(terms.values()))
    out = dict(zip(terms, _mean_of_ranks(values.detach()), strict=True))
    # The value of the whole batch, with the gradient of this rank's rows.
    out["loss"] = values[0] + (out["loss"] - values[0]).detach()
    return out


def _prepare(criterion, inputs):
    """This rank's rows, checked and in float32 or float64; the columns, rows of all ranks."""
    inputs = {name: x for name, x in inputs.items() if x is not None}
    _check_shapes(inputs)
    image, rows = inputs["image"], {}
    for name, x in inputs.items():
        # Half precision is raised: similarities, softmax and KL need at least float32.
        rows[name] = x.to(torch.promote_types(image.dtype, torch.float32))
        if "labels" not in name:  # a row of zeros was an overflow: NaN, so that it shows
            rows[name] = torch.where(x.any(1, keepdim=True), rows[name], float("nan"))
    if not image.is_cuda or not criterion._values_checked:
        _check_values(rows)
        criterion._values_checked = True
    columns, first = rows, 0
    if _world() > 1:
        columns = {name: AllGather.apply(x) for name, x in rows.items()}      # (N, .)
        first = dist.get_rank() * len(image)
    diagonal = torch.arange(len(image), device=image.device) + first          # (B,)
    rows = rows | {"diagonal": diagonal}
    if "hard_graph" in rows:
        rows["hard_diagonal"] = diagonal + len(columns["image"])
    else:  # T<->G alone has rows for the hard negatives, elsewhere they are columns
        rows = {name: x for name, x in rows.items() if "hard" not in name}
    return rows, columns


def _check_values(rows):
    """Raises ValueError for lengths, signs, and shapes unlike another rank's."""
    for name, x in rows.items():
        if "labels" in name:
            wrong = ~((x >= 0) & (x < float("inf")))
            wanted = "non-negative, finite values; make an uncertain -1 a 1 or a 0"
        else:
            length = x.detach().norm(dim=1)
            wrong = ((length - 1).abs() > 1e-2) & (length < float("inf"))
            wanted = "unit rows; use F.normalize(x, dim=-1)"
        if bool(wrong.any()):
            raise ValueError(f"{name}: expected {wanted}, got other rows in {tuple(x.shape)}")
    if _world() > 1:
        image, labels = rows["image"], rows["labels"]
        shapes = image.new_tensor([[len(rows), *image.shape, labels.shape[1]]])  # (1, 4)
        of_ranks = AllGather.apply(shapes)                                    # (world, 4)
        if bool((of_ranks != shapes).any()):
            raise ValueError("expected the same number of arguments, B, D, K on every rank, got "
                             f"{of_ranks.tolist()}")


def _similarities(x, X):
    """S of each stream that the batch has: (R, M)."""
    for k, name in STREAMS.items():
        if name in x:
            # ASSUMPTION: C is L2-normalised here; a report without labels is a zero row.
            # T and G too: rows that were normalised in half precision are off by up to 0.6 %.
            yield k, F.normalize(x[name]) @ F.normalize(X[name]).T            # (R, M)


def _one_positive(x):
    """The number of positives of one-hot labels: 1 in each stream that the batch has."""
    one = x["image"].new_ones(())
    return {f"positives_{k}": one for k, name in STREAMS.items() if name in x}


def _join(rows):
    """v, T = [T1; T2], C = [C1; C2], G = [G1; G2] and their diagonal, by their names."""
    joined = dict(rows)
    for name in rows:
        if f"hard_{name}" in rows:
            joined[name] = torch.cat([rows[name], rows[f"hard_{name}"]])
    return joined


def _check_shapes(inputs):
    """Raises ValueError where arguments are missing or their shapes do not fit together."""
    names = {"image", "text", "labels"} | inputs.keys() & {"graph"}
    if any("hard" in name for name in inputs):
        names |= {f"hard_{name}" for name in names - {"image"}}
    if names != inputs.keys():
        raise ValueError(f"expected {', '.join(sorted(names))}, got {', '.join(sorted(inputs))}")
    image, labels = inputs["image"], inputs["labels"]
    for name, x in inputs.items():
        shape = len(image), (labels if "labels" in name else image).shape[-1]
        if x.shape != shape:
            raise ValueError(f"{name}: expected shape {shape}, got {tuple(x.shape)}")


def _world():
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def _mean_of_ranks(x):
    if _world() == 1:
        return x
    x = x / _world()
    dist.all_reduce(x)
    return x


class AllGather(torch.autograd.Function):
    """Rows of all ranks in rank order, with gradients: (B, D) -> (N, D).

    The backward pass adds what every rank's loss says of this rank's rows; `dist.all_gather` alone
    would drop the other ranks' share and turn the gradient's direction.
    """

    @staticmethod
    def forward(ctx, x):
        of_ranks = [torch.empty_like(x) for _ in range(dist.get_world_size())]
        dist.all_gather(of_ranks, x.contiguous())
        return torch.cat(of_ranks)                                            # (N, D)

    @staticmethod
    def backward(ctx, grad):
        grad = grad.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(grad)
        return grad.chunk(dist.get_world_size())[dist.get_rank()]             # (B, D)
