"""Pure arithmetic: tensors in, tensors out. No configuration, no collectives: a global sum is
passed in as `reduce`.

B sequences, T tokens, M groups, N sequences in the global batch. Equation numbers refer to
docs/algorithm.md.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from gipo_megatron.tensors import Tensor, torch

Reduce = Callable[[Tensor], Tensor]  # sum over data parallel replicas

# ------------------------------------------------------------------------------------------- tokens


def sequence_sum(x: Tensor, mask: Tensor) -> Tensor:
    """sum_t mask x: [B, T] -> [B]."""
    return torch.where(mask, x, 0.0).sum(1)


def add_on_last_token(x: Tensor, mask: Tensor, value: Tensor) -> Tensor:
    """x with value[b] [B] added at the last masked token of row b (nowhere in a row without one).
    [B, T]"""
    last = mask & (mask.flip(1).cumsum(1).flip(1) == 1)
    return x + torch.where(last, value[:, None], 0.0)


def whiten(x: Tensor, mask: Tensor, reduce: Reduce, eps: float = 1e-8) -> Tensor:
    """(x - mean) / sqrt(var + eps) over all masked entries of the global batch, population
    variance; zero outside the mask. [B, T]"""
    kept = x[mask].double()
    count, total = reduce(torch.stack([torch.ones_like(kept).sum(), kept.sum()]))
    mean = total / count.clamp(min=1)
    var = reduce((kept - mean).square().sum().reshape(1))[0] / count.clamp(min=1)
    return torch.where(mask, (x - mean) * torch.rsqrt(var + eps), 0.0).to(x.dtype)


def gae(
    rewards: Tensor, values: Tensor, mask: Tensor, gamma: float, lam: float
) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimation; the state after the last response token is worth 0, also
    when truncated. All [B, T].

    delta_t = r_t + gamma V_{t+1} - V_t,   A_t = delta_t + gamma lambda A_{t+1},
    return_t = A_t + V_t.   (Schulman et al. 2016)

    The loop over T runs on the host: on an accelerator each of its 8 T small operations would be a
    kernel launch.
    """
    device = values.device
    rewards, values, mask = rewards.cpu(), values.cpu(), mask.cpu()
    m = mask.to(values.dtype)
    values, rewards = values * m, rewards * m
    advantages = torch.zeros_like(values)
    next_value = torch.zeros_like(values[:, 0])
    next_advantage = torch.zeros_like(next_value)
    for t in range(values.shape[1] - 1, -1, -1):
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        next_advantage = m[:, t] * (delta + gamma * lam * next_advantage)
        next_value = values[:, t]
        advantages[:, t] = next_advantage
    return advantages.to(device), (advantages + values).to(device)


def kl_estimate(logprobs: Tensor, reference: Tensor, kind: str) -> Tensor:
    """Per-token estimate of KL(pi || ref) from tokens drawn from pi. [B, T]

    k1 = log pi - log ref,   k2 = k1^2 / 2,   k3 = exp(-k1) - 1 + k1.
    (Schulman, "Approximating KL divergence", 2020)
    """
    k1 = logprobs - reference
    if kind == "k1":
        return k1
    if kind == "k2":
        return k1.square() / 2
    if kind == "k3":
        return torch.expm1(-k1) + k1
    raise ValueError(f"unknown KL estimator {kind!r}; there are k1, k2, k3")


def clipped_surrogate(
    logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, clip: float
) -> Tensor:
    """PPO's loss per token: max(-rho A, -clip(rho, 1 - eps, 1 + eps) A), rho = exp(logprobs -
    old_logprobs). [B, T]

    The trajectory weight is already inside A, so that for w < 0 the clip stays pessimistic
    (algorithm.md 5.8).
    """
    ratio = torch.exp(logprobs - old_logprobs)
    return torch.maximum(-ratio * advantages, -ratio.clamp(1 - clip, 1 + clip) * advantages)


def clipped_value_loss(values: Tensor, old_values: Tensor, returns: Tensor, clip: float) -> Tensor:
    """max((V - R)^2, (V_old + clip(V - V_old, +-eps) - R)^2) / 2 per token. [B, T]"""
    clipped = old_values + (values - old_values).clamp(-clip, clip)
    return torch.maximum((values - returns).square(), (clipped - returns).square()) / 2


# -------------------------------------------------------------------------------------- preferences


def preference_loss(log_ratio: Tensor, beta: float, label_smoothing: float = 0.0) -> Tensor:
    """-(1 - eps) log sigmoid(beta h) - eps log sigmoid(-beta h), h = `log_ratio` of each pair. [B]

    h = log pi(y_w|x)/pi_ref(y_w|x) - log pi(y_l|x)/pi_ref(y_l|x).   (Rafailov et al. 2023, eq. 7;
    with labels wrong eps of the time)
    """
    logsigmoid = torch.nn.functional.logsigmoid
    right, wrong = logsigmoid(beta * log_ratio), logsigmoid(-beta * log_ratio)
    return -(1 - label_smoothing) * right - label_smoothing * wrong


def ipo_loss(log_ratio: Tensor, tau: float) -> Tensor:
    """(h - 1 / (2 tau))^2, h = `log_ratio` as in `preference_loss`: a margin to reach, not one to
    grow without end. [B]   (Azar et al. 2023, eq. 17)"""
    return (log_ratio - 1 / (2 * tau)).square()


# ------------------------------------------------------------------------------------------- scores

MIN_STD = 1e-6  # below it all scores are the same
MAX_SCORE = 3.0


def standardised_scores(raw: Tensor, batch_mean: float, std: float) -> Tensor:
    """G_i = clip((s_i - batch mean) / sigma, +-3), sigma the running std; 0 when sigma < 1e-6. One
    scalar per trajectory. [B]

    Not the batch's own std: beta / sigma would grow as the batch becomes uniform (algorithm.md
    5.2).
    """
    if std < MIN_STD:
        return torch.zeros_like(raw)
    return ((raw - batch_mean) / std).clamp(-MAX_SCORE, MAX_SCORE)


def lower_tail_weights(x: Tensor, everyone: Tensor, alpha: float) -> Tensor:
    """1{x_i <= VaR_alpha} / alpha over the global batch `everyone` [N]; mean exactly 1. [B]

    Rows tied at VaR_alpha share the rest of the tail: w = (alpha N - #{below}) / (alpha
    #{tied}).   (Rockafellar, Uryasev 2002)
    """
    tail = alpha * len(everyone)
    rank = min(max(math.ceil(tail - 1e-9), 1), len(everyone))
    quantile = everyone.sort().values[rank - 1]
    below, tied = int((everyone < quantile).sum()), int((everyone == quantile).sum())
    return (x < quantile).to(x.dtype) / alpha + (x == quantile).to(x.dtype) * (
        (tail - below) / (alpha * tied)
    )


def auc(positive: Tensor, x: Tensor, cluster: Tensor, tie: float = 0.0) -> Tensor:
    """Within each cluster: probability that a positive row has the larger x, ties one half. All [N]
    -> [clusters], in sorted order.

    (sum of the positives' ranks - n+ (n+ + 1) / 2) / (n+ n-); NaN where a cluster has one kind
    only.   (Mann, Whitney 1947)
    Neighbours in the order of x that are at most `tie` apart count as equal.
    """
    _, which, sizes = cluster.unique(return_inverse=True, return_counts=True)
    order = x.argsort(stable=True)
    order = order[which[order].argsort(stable=True)]
    starts = torch.ones_like(order)
    starts[1:] = (which[order].diff() != 0) | (x[order].diff() > tie)
    level = torch.empty_like(order)
    level[order] = starts.cumsum(0) - 1
    ties = level.bincount()
    # average rank inside the cluster, from 1
    rank = (ties.cumsum(0) - (ties - 1) / 2)[level].double() - (sizes.cumsum(0) - sizes)[which]
    ups = torch.zeros(len(sizes), dtype=torch.float64, device=x.device).index_add_(
        0, which, positive.double()
    )
    total = torch.zeros_like(ups).index_add_(0, which, positive * rank)
    return (total - ups * (ups + 1) / 2) / (ups * (sizes - ups))


def between_share(x: Tensor, cluster: Tensor) -> Tensor:
    """Return the share of the variance of x that lies between clusters, both [N]: s_b^2 / (s_b^2 +
    s_w^2), the intraclass correlation of a one-way layout.

    s_w^2 = SS_within / (N - K), s_b^2 = max(MS_between - s_w^2, 0) / n0, n0 = (N - sum n_k^2 / N) /
    (K - 1). NaN with one cluster, or one row each.   (Searle, Casella, McCulloch 1992, section 3.6)
    """
    _, which, sizes = cluster.unique(return_inverse=True, return_counts=True)
    x, n, rows, count = x.double(), sizes.double(), len(x), len(sizes)
    means = torch.zeros_like(n).index_add_(0, which, x) / n
    if not 1 < count < rows:
        return x.new_tensor(math.nan)
    within = (x - means[which]).square().sum() / (rows - count)
    mean_square = (n * (means - x.mean()).square()).sum() / (count - 1)
    size = (rows - n.square().sum() / rows) / (count - 1)
    between = (mean_square - within).clamp(min=0) / size
    return between / (between + within)


# ------------------------------------------------------------------------------------------- groups


def group_sums(probs: Tensor, sample_scores: Tensor) -> Tensor:
    """[2M + 2] sums over this replica's rows, float64: sum_i p_ig, sum_i p_ig G_i, N, sum_i G_i."""
    p, g = probs.double(), sample_scores.double()
    return torch.cat(
        [p.sum(0), (p * g[:, None]).sum(0), g.new_tensor([float(len(g))]), g.sum().reshape(1)]
    )


def group_means(sums: Tensor) -> tuple[Tensor, Tensor, Tensor, int]:
    """(R_g [M], m_g [M], R_all, N) from the global `group_sums`; m_g is floored at 1e-6 N, so an
    empty group is finite."""
    groups = (len(sums) - 2) // 2
    count = int(sums[-2].item())
    masses = sums[:groups].clamp(min=1e-6 * count)
    return sums[groups : 2 * groups] / masses, masses, sums[-1] / count, count


def group_variance(means: Tensor, shares: Tensor, mean_score: Tensor, kind: str) -> Tensor:
    """R_var: uniform = (1/M) sum_g (R_g - mean_g R_g)^2; mass = sum_g rho_g (R_g - R_all)^2."""
    if kind == "uniform":
        return (means - means.mean()).square().mean()
    if kind == "mass":
        return (shares * (means - mean_score).square()).sum()
    raise ValueError(f"unknown variance {kind!r}; there are mass and uniform")


def group_loss_coefficients(
    sample_scores: Tensor, means: Tensor, masses: Tensor, count: int, kind: str
) -> Tensor:
    """c_ig = N dR_var / dp_ig, up to a constant per i that a softmax ignores. [B, M]

    uniform: N (2/M) (R_g - mean_g R_g) (G_i - R_g) / m_g          mass: G_i^2 - (G_i - R_g)^2
    """
    g = sample_scores.to(means.dtype)[:, None]
    if kind == "uniform":
        return count * (2 / len(means)) * (means - means.mean()) * (g - means) / masses
    if kind == "mass":
        return g.square() - (g - means).square()
    raise ValueError(f"unknown variance {kind!r}; there are mass and uniform")


def group_weights(
    probs: Tensor, means: Tensor, shares: Tensor, mean_score: Tensor, beta: float, kind: str
) -> Tensor:
    """w_i = 1 - beta dR_var/dJ_i N: stage 2 is PPO on w_i A_t; mean w = 1. [B]

    uniform: 1 - beta (2/M) sum_g (R_g - mean_g R_g) p_ig / rho_g          mass: 1 - 2 beta sum_g
    p_ig (R_g - R_all)
    """
    p = probs.to(means.dtype)
    if kind == "uniform":
        return 1 - beta * (2 / len(means)) * (p * ((means - means.mean()) / shares)).sum(1)
    if kind == "mass":
        return 1 - 2 * beta * (p * (means - mean_score)).sum(1)
    raise ValueError(f"unknown variance {kind!r}; there are mass and uniform")


def otsu_threshold(x: Tensor, mass: Tensor) -> Tensor:
    """Return the threshold of x [K], with masses [K], that maximises rho_1 rho_2 (mean_1 -
    mean_2)^2 between x <= threshold and x > threshold; max x where all are equal.   (Otsu 1979)
    """
    order = x.argsort()
    x, mass = x[order], mass[order]
    below, total = mass.cumsum(0), (mass * x).cumsum(0)
    above = below[-1] - below
    spread = total / below - (total[-1] - total) / above
    # a split lies between two different values; none is after the last one
    between = torch.where(x[1:] > x[:-1], (below * above * spread.square())[:-1], 0.0)
    if not len(between) or float(between.max()) == 0:
        return x[-1]
    return x[between.argmax()]


def with_mean_one(x: Tensor, low: float, high: float) -> Tensor:
    """Return the c nearest to x (least squares) with low <= c_i <= high and mean c = 1. [N]

    c = clip(x + mu, low, high), mu by bisection (float64); low <= 1 <= high.
    """
    left, right = low - float(x.max()), high - float(x.min())
    for _ in range(100):
        mu = (left + right) / 2
        if float((x + mu).clamp(low, high).mean()) < 1:
            left = mu
        else:
            right = mu
    return (x + right).clamp(low, high)
