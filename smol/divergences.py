"""
How far a student's distribution is from its teacher's, at each place of an answer: what distill.py minimises.

From generalised knowledge distillation (Agarwal et al., arXiv 2306.13649), with P the teacher and Q the student:

    forward_kl   sum P log(P / Q)                        Q must cover whatever P finds likely
    reverse_kl   sum Q log(Q / P)                        Q must keep to what P finds likely; may leave some of it out
    jsd          beta KL(P, M) + (1 - beta) KL(Q, M)     with M = beta P + (1 - beta) Q: between the two, and never above log 2

A teacher that is certain of one outcome while the student is certain of another, 0.99 to 0.999, moves the student's logits by a gradient
of norm 1.41 with forward_kl, 0.08 with reverse_kl and 0.005 with jsd: what Q finds unlikely has no weight in the last two, however wrong
that is. At temperature 2, reverse_kl has 0.38. Such teachers are common where a puzzle has one answer (LOG.md).

Everything is in nats and computed from logits, in float32 at least. The teacher's side has no gradient. Read next: distill.py.
"""

import math

import torch

DIVERGENCES = ("reverse_kl", "forward_kl", "jsd")


def kl(p, q):
    """KL(p || q) of log-probabilities (..., V) -> (...). What p finds impossible counts 0."""
    return torch.where(p > -torch.inf, p.exp() * (p - q), 0.0).sum(-1)


def divergence(student, teacher, kind="reverse_kl", beta=0.5, temperature=1.0):
    """
    student, teacher (..., V): logits or log-probabilities, finite for the student -> (...), 0 where they agree. temperature softens
    both. beta: jsd's, between 0 and 1. ValueError for another kind.
    """
    q, p = (
        t.to(torch.promote_types(t.dtype, torch.float32)).div(temperature).log_softmax(-1)
        for t in (student, teacher.detach())
    )
    if kind == "reverse_kl":
        return kl(q, p)
    if kind == "forward_kl":
        return kl(p, q)
    if kind != "jsd":
        raise ValueError(f"divergence must be one of {', '.join(map(repr, DIVERGENCES))}, got {kind!r}")
    m = torch.logaddexp(p + math.log(beta), q + math.log(1 - beta))
    return beta * kl(p, m) + (1 - beta) * kl(q, m)
