"""Dynamic soft contrastive loss: Sec. 4.2-4.3, Eq. 1-10. Copy this file; it needs torch alone.

    criterion = DynamicSoftContrastiveLoss()
    out = criterion(image, text, labels, 1 / temperature,     # unit rows (B, D), labels (B, K)
                    hard_text=hard_text, hard_labels=hard_labels)
    out["loss"].backward()
    print({name: value.item() for name, value in out.items()})

The loss of one ordered pair of modalities is the KL divergence between soft labels, made from the
similarities inside a modality, and the softmax of the similarities across modalities:

    T = [T1; T2], C = [C1; C2], G = [G1; G2]      reports first, their hard negatives after them
    p = softmax(v T^T / temperature)              Eq. 1, Eq. 2
    S = T T^T                                     Eq. 3, Eq. 8
    y = (S - tau) / (1 - tau) where S > tau, 0 elsewhere            Eq. 4, Eq. 5, Eq. 9
    y_hat = y with rows that sum to 1
    L = mean over rows of KL(y_hat || p)          Eq. 6, Eq. 7
    total = sum over ordered pairs of w_T L_t + w_C L_c + w_G L_g   Eq. 10

Each product is computed once, and the streams' labels are mixed first, since log p meets them
linearly; the 18 terms of Eq. 10 one by one are `literal_loss` in tests/test_loss.py.

Under torch.distributed every rank passes its own rows, in equal numbers. Rows of all ranks are
gathered, each rank evaluates the rows that are its own, and the mean of gradients that
DistributedDataParallel takes is the gradient of the loss of the whole batch.

Symbols: B rows of this rank, N = world x B rows of all ranks, M columns (2N with hard negatives,
else N), R rows of one block, R1 of them of T1; D embedding width, K labels.

SPDX-License-Identifier: MIT
"""

import torch
import torch.distributed as dist
from torch import nn
from torch.nn import functional as F


def above_threshold(similarity: torch.Tensor, tau: float, own: torch.Tensor) -> torch.Tensor:
    """y of Eq. 4, Eq. 5 and Eq. 9, before its rows are normalised.

    similarity: (R, M) in [-1, 1]; tau: in [0, 1); own: (R,) column of each row's own item.
    Returns (R, M), non-negative.
    """
    y = (similarity - tau).div_(1 - tau).clamp_(min=0)                        # (R, M)  Eq. 4
    # ASSUMPTION: the diagonal is 1 before row normalisation, for rows without labels.
    return y.scatter_(1, own[:, None], 1.0)


def soft_labels(similarity: torch.Tensor, threshold: float) -> torch.Tensor:
    """y_hat of Eq. 4, Eq. 5, Eq. 9: similarities above the threshold, stretched; rows sum to 1.

    The same for a whole matrix as the loss does by blocks of rows. similarity: (n, n), entries in
    [-1, 1]; threshold: tau in [0, 1).
    Returns (n, n) without gradient, float32 or float64. Raises ValueError for another shape or tau.
    """
    if not 0 <= threshold < 1:
        raise ValueError(f"threshold: expected a number in [0, 1), got {threshold}")
    if similarity.dim() != 2 or similarity.shape[0] != similarity.shape[1]:
        raise ValueError(f"similarity: expected (n, n), got {tuple(similarity.shape)}")
    s = similarity.detach().to(torch.promote_types(similarity.dtype, torch.float32))
    y = above_threshold(s, threshold, torch.arange(len(s), device=s.device))
    return y / y.sum(1, keepdim=True)                                         # (n, n)


class DynamicSoftContrastiveLoss(nn.Module):
    """Eq. 10 over image, text and, where given, graph embeddings.

    w_text, w_clinical, w_graph: w_T, w_C, w_G of Eq. 10, non-negative.
    tau_text, tau_clinical, tau_graph: thresholds of Eq. 4, 5, 9, in [0, 1).
    soft: False gives CLIP: one cross-entropy with one-hot labels per ordered pair, in which case
        weights and thresholds are ignored. It is the sum over pairs, so twice CLIP's usual mean.
    row_chunk: evaluate that many rows at a time; same values and gradients, with memory of
        row_chunk x M instead of M x M.
    Raises ValueError for a weight or threshold out of range.
    """

    # ASSUMPTION: thresholds and weights are unpublished; tests/study.py chose these.
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
        if row_chunk is not None and (row_chunk < 1 or row_chunk != int(row_chunk)):
            raise ValueError(f"row_chunk: expected None or a number of rows, got {row_chunk}")

    def forward(self, image, text, labels, logit_scale, *, hard_text=None, hard_labels=None,
                graph=None, hard_graph=None) -> dict[str, torch.Tensor]:
        """Evaluate the loss of a batch.

        image, text, graph, hard_text, hard_graph: (B, D), unit rows: v, T1, G1, T2, G2.
        labels, hard_labels: (B, K), non-negative, not normalised: C1, C2. Without any labels:
            torch.zeros(B, 1) for both, and w_clinical=0 in the constructor.
        logit_scale: 1 / temperature (`.exp()` of CLIP's parameter), a scalar tensor or a float.
        Returns "loss" (Eq. 10, a scalar) and detached scalars: the share of each ordered pair
        ("image_text", ...), which add up to the loss, and "positives_text", "_clinical", "_graph",
        the effective number of positives exp(entropy) of a row of soft labels, averaged.
        Raises ValueError naming the argument and its shape; row lengths, signs and other ranks'
        shapes are checked on the CPU always, on CUDA in the first call only, so that no later call
        waits for the device. NaN in a row is no error: the loss is NaN, and a step can be skipped.
        """
        inputs = {"image": image, "text": text, "hard_text": hard_text,
                  "graph": graph, "hard_graph": hard_graph,
                  "labels": labels, "hard_labels": hard_labels}
        inputs = {name: x for name, x in inputs.items() if x is not None}
        self._check(inputs)
        # Half precision is raised: similarities, softmax and KL need at least float32.
        dtype = torch.promote_types(image.dtype, torch.float32)
        with torch.autocast(image.device.type, enabled=False):
            inputs = {name: x.to(dtype) for name, x in inputs.items()}
            scale = torch.as_tensor(logit_scale, dtype=dtype, device=image.device)
            if scale.numel() != 1:
                raise ValueError(f"logit_scale: expected a scalar, got {tuple(scale.shape)}")
            return self._loss(_gather(inputs), scale, len(image))

    def _loss(self, inputs, scale, B):
        """Eq. 10 of the inputs of all ranks; the rows with index `own` are this rank's."""
        modality = {"image": inputs["image"], "text": _join(inputs, "text")}  # v (N, D), T (M, D)
        streams = {"text": modality["text"], "clinical": _join(inputs, "labels")}     # C (M, K)
        if "graph" in inputs:
            modality["graph"] = streams["graph"] = _join(inputs, "graph")     # (M, D)  G = [G1; G2]
        # ASSUMPTION: soft labels carry no gradient.
        # ASSUMPTION: C is L2-normalised here; a report without labels is a zero row.
        # T and G too: rows that were normalised in half precision are off by up to 0.6 %.
        streams = {name: F.normalize(x.detach(), dim=1) for name, x in streams.items()}
        N, M = len(modality["image"]), len(modality["text"])
        first = (dist.get_rank() if N > B else 0) * B
        own = torch.arange(first, first + B, device=scale.device)             # (B,)
        if "graph" in modality and M > N:
            own = torch.cat([own, N + own])  # T<->G has rows for the hard negatives too
        tensors = {"scale": scale, **modality}
        leaves, values, size = tensors, 0, self.row_chunk or len(own)
        chunked = size < len(own) and torch.is_grad_enabled()
        if chunked:
            leaves = {name: x.detach().requires_grad_() for name, x in tensors.items()}
        for i in range(0, len(own), size):
            terms = self._block(own, slice(i, i + size), B, streams, **leaves)
            if chunked:  # at once: no block is kept, and none computed twice
                terms["loss"].backward()
            values = values + torch.stack([x.detach() for x in terms.values()])
        loss = terms["loss"] if size >= len(own) else values[0]
        if chunked:  # adds 0, whose gradient is the sum of the blocks' gradients
            share = sum((x * leaves[name].grad).sum() for name, x in tensors.items())
            loss = loss + (share - share.detach())
        if N > B:  # the value of the whole batch; the gradient stays that of this rank's rows
            dist.all_reduce(values)
            values /= dist.get_world_size()
            loss = loss + (values[0] - loss.detach())
        return dict(zip(terms, values, strict=True)) | {"loss": loss}

    def _block(self, own, part, B, streams, scale, **modality):
        """All terms of Eq. 10 of the rows own[part], as shares of the means over all rows.

        own: indices into [T1; T2] of all ranks, the first B of them into T1. streams: unit rows
        "text" T, "clinical" C, "graph" G, (M, .). modality: "image" (N, D), "text", "graph" (M, D).
        """
        N, M = len(modality["image"]), len(modality["text"])
        rows, R1 = own[part], len(own[:B][part])  # (R,), and how many of them are of T1
        whole = N == B and len(rows) == len(own)  # one rank, one block
        targets, positives = self._targets(rows, R1, N, streams, scale)
        logits, terms = {}, {}
        for a in modality:
            for b in modality:
                if a == b:
                    continue
                # "we use T1 and G1 instead of T and G when compared with I" (Eq. 10).
                # ASSUMPTION: T1, G1 are rows against I; I->T and I->G keep the 2B columns of Eq. 1.
                # ASSUMPTION: T<->G compares all 2B rows; each KL is the mean over its rows.
                r, count = (R1, B) if "image" in (a, b) else (len(rows), len(own))
                m = N if b == "image" else M
                if whole and (b, a) in logits:  # the same products, seen from the other side
                    z = logits[b, a][:, :r].T.contiguous()                    # (r, m)
                else:
                    left = modality[a] if whole else modality[a][rows[:r]]    # (r, D)
                    z = scale * left @ modality[b][:m].T                      # (r, m)
                    logits[a, b] = z
                if self.soft:  # p = softmax(z) of Eq. 1, Eq. 2, for all streams k at once:
                    # sum_k w_k KL(y_hat_k || p) = -sum_k w_k H(y_hat_k) - (sum_k w_k y_hat_k) log p
                    y_hat, entropy = targets["square" if m < M else "wide"]
                    kl = F.cross_entropy(z, y_hat[:r], reduction="sum") - entropy[:r].sum()
                else:
                    # ASSUMPTION: systems without D have one cross-entropy per ordered pair.
                    kl = F.cross_entropy(z, rows[:r], reduction="sum")
                terms[f"{a}_{b}"] = kl / count                                # Eq. 6, Eq. 7
        positives = {f"positives_{name}": x / len(own) for name, x in positives.items()}
        return {"loss": sum(terms.values()), **terms, **positives}            # Eq. 10

    @torch.no_grad()
    def _targets(self, rows, R1, N, streams, scale):
        """Soft labels of a block of rows, all streams mixed: sum_k w_k y_hat_k.

        Returns {"wide": ((R, M), (R,)), "square": ((R1, N), (R1,))}, the latter of T1, G1 against I
        where N < M: mixed rows with their sum_k w_k H(y_hat_k); and exp(entropy) of each stream,
        summed over rows.
        """
        if not self.soft:
            return {}, dict.fromkeys(streams, scale.new_tensor(len(rows)))
        targets, positives = {}, {}
        for name, x in streams.items():
            w, M = self.weights[name], len(x)
            s = x[rows] @ x.T                                                 # (R, M)  Eq. 3, Eq. 8
            y = self._unnormalised(s, self.thresholds[name], rows, scale)     # (R, M)  Eq. 4, 5, 9
            y_log_y = y.clamp(min=1e-30).log_().mul_(y)  # 0 log 0 = 0; xlogy takes 8 times as long
            # ASSUMPTION: T1->I and G1->I take the top-left N x N of y, re-normalised.
            for kind, r, m in (("wide", len(rows), M), ("square", R1, N))[:1 + (N < M)]:
                total = y[:r, :m].sum(1)                                      # (r,)
                entropy = total.log() - y_log_y[:r, :m].sum(1) / total        # (r,)  H(y_hat)
                y_hat = y[:r, :m] * (w / total)[:, None]                      # (r, m)  times w
                if kind in targets:
                    targets[kind][0].add_(y_hat)
                    targets[kind][1].add_(w * entropy)
                else:
                    targets[kind] = y_hat, w * entropy
                if kind == "wide":
                    positives[name] = entropy.exp().sum()
        return targets, positives

    def _unnormalised(self, similarity, tau, rows, scale):
        return above_threshold(similarity, tau, rows)  # scale is for SoftCLIPLoss

    def _check(self, inputs):
        """Shapes always; values and the other ranks' batch size where that costs no waiting."""
        image, labels = inputs.get("image"), inputs.get("labels")
        for name, x, shape in (("image", image, "(B, D)"), ("labels", labels, "(B, K)")):
            if not torch.is_tensor(x) or x.dim() != 2 or not len(x):
                raise ValueError(f"{name}: expected a tensor {shape} with rows, got {_shape(x)}")
        hard, graph = (any(word in name for name in inputs) for word in ("hard", "graph"))
        needed = ["image", "text", "labels"] + ["hard_text", "hard_labels"] * hard
        needed += ["graph"] * graph + ["hard_graph"] * (hard and graph)
        for name in needed:
            shape = (len(image), (labels if "labels" in name else image).shape[1])
            if _shape(inputs.get(name)) != shape:
                beside = ", ".join(n for n in inputs if n not in ("image", "text", "labels"))
                raise ValueError(f"{name}: expected shape {shape}, got {_shape(inputs.get(name))}"
                                 + f" beside {beside}" * (name not in inputs))
        if image.is_cuda and self._values_checked:
            return
        for name, x in inputs.items():
            if name.endswith("labels"):
                if not bool(((x >= 0) & (x < float("inf"))).all()):
                    raise ValueError(f"{name}: expected non-negative, finite values in "
                                     f"{tuple(x.shape)}; make an uncertain -1 a 1 or a 0")
            elif float((x.detach().float().norm(dim=1) - 1).abs().max()) > 1e-2:
                raise ValueError(f"{name}: expected unit rows in {tuple(x.shape)}; use "
                                 "F.normalize(x, dim=-1)")
        if _world() > 1:
            shapes = [len(image), image.shape[1], labels.shape[1], hard, graph]
            every = [torch.tensor(shapes, device=image.device) for _ in range(_world())]
            dist.all_gather(every, every[dist.get_rank()].clone())
            if any(not torch.equal(x, every[0]) for x in every):
                raise ValueError("expected the same arguments and shapes on every rank, got B, D, "
                                 f"K, hard and graph of {[x.tolist() for x in every]}")
        self._values_checked = True


class SoftCLIPLoss(DynamicSoftContrastiveLoss):
    """SoftCLIP's intra-modal targets on the same pairs: y_hat = softmax(S_t / temperature)."""

    # DIFFERS from SoftCLIP: no region features, no disentangled negatives, targets from text alone.

    def __init__(self, row_chunk=None):
        super().__init__(w_clinical=0.0, w_graph=0.0, row_chunk=row_chunk)

    def _unnormalised(self, similarity, tau, rows, scale):
        return (scale * (similarity - 1)).exp().scatter_(1, rows[:, None], 1.0)  # (R, M)


# ---------------------------------------------------------------- plumbing


def _shape(x):
    return tuple(x.shape) if torch.is_tensor(x) else None if x is None else type(x).__name__


def _world() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def _gather(inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """All ranks' rows of every tensor in one exchange: {name: (B, d)} -> {name: (N, d)}."""
    if _world() == 1:
        return inputs
    joined = AllGather.apply(torch.cat(list(inputs.values()), dim=1))         # (N, sum of widths)
    parts = joined.split([x.shape[1] for x in inputs.values()], dim=1)
    return dict(zip(inputs, parts, strict=True))


def _join(inputs, name):
    """[X1; X2] of Sec. 4.2, (M, d): reports of all ranks, then their hard negatives."""
    hard = f"hard_{name}"
    return torch.cat([inputs[name], inputs[hard]]) if hard in inputs else inputs[name]


class AllGather(torch.autograd.Function):
    """Rows of all ranks in rank order, with gradients: (B, D) -> (N, D).

    The backward pass adds what every rank's loss says of this rank's rows; `dist.all_gather` alone
    would drop the other ranks' share and turn the gradient's direction.
    """

    @staticmethod
    def forward(ctx, x):
        parts = [torch.empty_like(x) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, x.contiguous())
        return torch.cat(parts)                                               # (N, D)

    @staticmethod
    def backward(ctx, grad):
        grad = grad.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(grad)
        return grad.chunk(dist.get_world_size())[dist.get_rank()]             # (B, D)
