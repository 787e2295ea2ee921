"""Dynamic soft contrastive loss: Sec. 4.2-4.3, Eq. 1-10. Copy this file; it needs torch alone.

    criterion = DynamicSoftContrastiveLoss()
    out = criterion(image, text, labels, logit_scale,         # unit rows (B, D), labels (B, K)
                    hard_text=hard_text, hard_labels=hard_labels)
    out["loss"].backward()
    print({name: value.item() for name, value in out.items()})

The loss of one ordered pair of modalities is the KL divergence between soft labels, made from the
similarities inside a modality, and the softmax of the similarities across modalities:

    T = [T1; T2], C = [C1; C2], G = [G1; G2]      reports first, their hard negatives after them
    S = T T^T                                     Eq. 3, 8
    y = (S - tau) / (1 - tau) where S > tau, 0 elsewhere, rows normalised to 1      Eq. 4, 5, 9
    p = softmax(logit_scale * I T^T)              Eq. 1, 2
    L = mean over rows of KL(y || p)              Eq. 6, 7
    total = sum over ordered pairs of w_T L_t + w_C L_c + w_G L_g                   Eq. 10

Under torch.distributed every rank passes its own rows, in equal numbers. Rows of all ranks are
gathered, each rank evaluates the rows that are its own, and the mean of gradients that
DistributedDataParallel takes is the gradient of the loss of the whole batch.

Symbols: B rows of this rank, N = world x B rows of all ranks, M columns (2N with hard negatives,
else N), R rows of one block, D embedding width, K labels.

SPDX-License-Identifier: MIT
"""

import torch
import torch.distributed as dist
from torch import nn
from torch.nn import functional as F


def above_threshold(similarity: torch.Tensor, tau: float, own: torch.Tensor) -> torch.Tensor:
    """y of Eq. 4, 5 and 9 before its rows are normalised.

    similarity: (R, M) in [-1, 1]; tau: in [0, 1); own: (R,) column of each row's own item.
    Returns (R, M), non-negative.
    """
    y = (similarity - tau).div_(1 - tau).clamp_(min=0)                        # (R, M)  Eq. 4
    # ASSUMPTION: the diagonal is 1 before row normalisation (zero labels, empty graphs).
    return y.scatter_(1, own[:, None], 1.0)


def soft_labels(similarity: torch.Tensor, threshold: float) -> torch.Tensor:
    """Soft labels of Eq. 4, 5, 9: similarities above the threshold, stretched to (0, 1], rows to 1.

    The same for a whole matrix as the loss does by blocks of rows. similarity: (n, n), entries in
    [-1, 1]; threshold: tau in [0, 1).
    Returns (n, n) without gradient, float32 or float64. Raises ValueError otherwise.
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
        weights and thresholds are ignored.
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
        if row_chunk is not None and row_chunk < 1:
            raise ValueError(f"row_chunk: expected None or at least 1, got {row_chunk}")

    def forward(self, image, text, labels, logit_scale, *, hard_text=None, hard_labels=None,
                graph=None, hard_graph=None) -> dict[str, torch.Tensor]:
        """Evaluate the loss of a batch.

        image, text, graph, hard_text, hard_graph: (B, D), unit rows: v, T1, G1, T2, G2.
        labels, hard_labels: (B, K), non-negative, not normalised: C1, C2. Without any labels:
            w_clinical=0 and torch.zeros(B, 1).
        logit_scale: 1 / temperature, a scalar tensor or a float.
        Returns "loss" (Eq. 10, a scalar) and detached scalars: the share of each ordered pair
        ("image_text", ...), which add up to the loss, and "positives_text", "_clinical", "_graph",
        the effective number of positives exp(entropy) of a row of soft labels, averaged.
        Raises ValueError naming the argument and its shape; row lengths and signs are checked on
        the CPU always, on CUDA in the first call only, so that no later call waits for the device.
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
        image = inputs["image"]                                               # (N, D)  v
        text = _join(inputs, "text")                                          # (M, D)  T = [T1; T2]
        graph = _join(inputs, "graph") if "graph" in inputs else None         # (M, D)  G = [G1; G2]
        # ASSUMPTION: C is L2-normalised here; a report without labels is a zero row.
        clinical = F.normalize(_join(inputs, "labels"), dim=1)                # (M, K)  C = [C1; C2]
        N = len(image)
        first = (dist.get_rank() if N > B else 0) * B
        own = torch.arange(first, first + B, device=image.device)             # (B,)
        if graph is not None and len(text) > N:
            own = torch.cat([own, N + own])  # T<->G has rows for the hard negatives too
        size = self.row_chunk or len(own)
        blocks = [(rows, min(max(B - i * size, 0), len(rows)))  # row indices; how many are of T1
                  for i, rows in enumerate(own.split(size))]
        tensors = {"scale": scale, "image": image, "text": text}
        tensors |= {"graph": graph} if graph is not None else {}
        leaves = tensors
        if len(blocks) > 1 and torch.is_grad_enabled():
            leaves = {name: x.detach().requires_grad_() for name, x in tensors.items()}
        values = 0
        for rows, R1 in blocks:
            terms = self._block(rows, R1, B, clinical, **leaves)
            if leaves is not tensors:  # at once: no block is kept, and none computed twice
                terms["loss"].backward()
            values = values + torch.stack([x.detach() for x in terms.values()])
        loss = terms["loss"] if len(blocks) == 1 else values[0]
        if leaves is not tensors:  # the same value, with the gradients of all blocks
            share = sum((x * leaves[name].grad).sum() for name, x in tensors.items())
            loss = loss + (share - share.detach())
        if N > B:  # the value of the whole batch; the gradient stays that of this rank's rows
            dist.all_reduce(values)
            values /= dist.get_world_size()
            loss = loss + (values[0] - loss.detach())
        return dict(zip(terms, values, strict=True)) | {"loss": loss}

    def _block(self, rows, R1, B, clinical, scale, **modality):
        """All terms of Eq. 10 that have the given rows, as shares of the means over rows.

        rows: (R,) indices into [T1; T2] of all ranks, R1 of them, the first, into T1.
        modality: {"image": (N, D), "text": (M, D), "graph": (M, D)}; clinical: (M, K).
        """
        N, M = len(modality["image"]), len(modality["text"])
        R = len(rows)
        whole = R == (M if "graph" in modality else N)  # one rank, one block
        streams = {"text": modality["text"], "clinical": clinical, "graph": modality.get("graph")}
        count = B * M // N if "graph" in modality else B  # rows of all blocks
        targets, entropy, positives = self._targets(rows, R1, N, streams, scale)
        logits, terms = {}, {}
        for a in modality:
            for b in modality:
                if a == b:
                    continue
                # "we use T1 and G1 instead of T and G when compared with I" (Eq. 10).
                # ASSUMPTION: T1, G1 are rows against I; I->T and I->G keep the 2B columns of Eq. 1.
                # ASSUMPTION: T<->G compares all 2B rows; each KL is the mean over its rows.
                r = R if "image" not in (a, b) else R1
                m = N if b == "image" else M
                if whole and (b, a) in logits:  # the same products, seen from the other side
                    z = logits[b, a][:, :r].T.contiguous()                    # (r, m)
                else:
                    left = modality[a] if whole else modality[a][rows[:r]]    # (r, D)
                    z = scale * left @ modality[b][:m].T                      # (r, m)  Eq. 1, 2
                    logits[a, b] = z
                if self.soft:
                    # sum_k w_k KL(y_k || p) = -sum_k w_k H(y_k) - sum (sum_k w_k y_k) log p
                    kl = F.cross_entropy(z, targets[m][:r], reduction="sum") - entropy[m][:r].sum()
                else:
                    # ASSUMPTION: systems without D have one cross-entropy per ordered pair.
                    kl = F.cross_entropy(z, rows[:r], reduction="sum")
                terms[f"{a}_{b}"] = kl / (B if "image" in (a, b) else count)  # Eq. 6, 7
        positives = {name: value / count for name, value in positives.items()}
        return {"loss": sum(terms.values()), **terms, **positives}            # Eq. 10

    @torch.no_grad()
    def _targets(self, rows, R1, N, streams, scale):
        """Soft labels of a block of rows, all streams mixed: sum_k w_k y_k.

        Returns targets and entropy by the number of columns, {M: (R, M), N: (R1, N)} and
        {M: (R,), N: (R1,)}, the latter sum_k w_k H(y_k); and the sums of "positives_*".
        """
        # ASSUMPTION: soft labels carry no gradient.
        streams = {name: x for name, x in streams.items() if x is not None}
        targets, entropy, positives = {}, {}, {}
        for name, x in streams.items():
            if not self.soft:
                positives[f"positives_{name}"] = x.new_tensor(len(rows))
                continue
            s = x[rows] @ x.T                                                 # (R, M)  Eq. 3, 8
            y = self._weigh(s, self.thresholds[name], rows, scale)            # (R, M)  Eq. 4, 5, 9
            y_log_y = y.clamp(min=1e-30).log_().mul_(y)  # 0 log 0 = 0; xlogy takes 8 times as long
            # ASSUMPTION: a smaller block of logits takes the top-left block of y, re-normalised.
            for r, m in {(len(rows), x.shape[0]), (R1, N)}:
                total = y[:r, :m].sum(1)                                      # (r,)
                h = total.log() - y_log_y[:r, :m].sum(1) / total  # (r,) entropy of y / total
                w = self.weights[name]
                mixed = y[:r, :m] * (w / total)[:, None]                      # (r, m)
                targets[m] = targets[m].add_(mixed) if m in targets else mixed
                entropy[m] = entropy.get(m, 0) + w * h
                if m == x.shape[0]:
                    positives[f"positives_{name}"] = h.exp().sum()
        return targets, entropy, positives

    def _weigh(self, similarity, tau, rows, scale):
        return above_threshold(similarity, tau, rows)

    def _check(self, inputs):
        """Shapes always; values and the other ranks' batch size where that costs no waiting."""
        image, labels = inputs["image"], inputs.get("labels")
        if image.dim() != 2 or not len(image):
            raise ValueError(f"image: expected (B, D) with rows, got {tuple(image.shape)}")
        if labels is None or labels.dim() != 2:
            raise ValueError("labels: expected (B, K), a column for each label, got "
                             f"{None if labels is None else tuple(labels.shape)}")
        hard, graph = (any(word in name for name in inputs) for word in ("hard", "graph"))
        for name in ("image", "text", "labels", "hard_text", "hard_labels", "graph", "hard_graph"):
            if ("hard" in name and not hard) or ("graph" in name and not graph):
                continue
            shape = (len(image), (labels if "labels" in name else image).shape[1])
            got = tuple(inputs[name].shape) if name in inputs else f"None beside {[*inputs]}"
            if got != shape:
                raise ValueError(f"{name}: expected shape {shape}, got {got}")
        if image.is_cuda and self._values_checked:
            return
        self._values_checked = True
        for name, x in inputs.items():
            if name.endswith("labels"):
                if not bool(((x >= 0) & (x < float("inf"))).all()):
                    raise ValueError(f"{name}: expected non-negative, finite values in "
                                     f"{tuple(x.shape)}; make an uncertain -1 a 1 or a 0")
            elif float((x.detach().float().norm(dim=1) - 1).abs().max()) > 1e-2:
                raise ValueError(f"{name}: expected unit rows in {tuple(x.shape)}; use "
                                 "F.normalize(x, dim=-1)")
        if _world() > 1:
            sizes = [torch.tensor([len(image)], device=image.device) for _ in range(_world())]
            dist.all_gather(sizes, sizes[dist.get_rank()].clone())
            if len({int(size) for size in sizes}) > 1:
                raise ValueError(f"image: expected the same number of rows on every rank, got "
                                 f"{[int(size) for size in sizes]}")


class SoftCLIPLoss(DynamicSoftContrastiveLoss):
    """SoftCLIP's intra-modal targets on the same pairs: y = softmax(S_t / temperature)."""

    # DIFFERS from SoftCLIP: no region features, no disentangled negatives, targets from text alone.

    def __init__(self, row_chunk=None):
        super().__init__(1.0, 0.0, 0.0, 0.0, 0.0, 0.0, row_chunk=row_chunk)

    def _weigh(self, similarity, tau, rows, scale):
        return (scale * (similarity - 1)).exp().scatter_(1, rows[:, None], 1.0)  # (R, M)


# ---------------------------------------------------------------- plumbing


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
