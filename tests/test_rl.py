"""PPO on toys that can be counted through: exact gradients, hand calculations, and equalities that must hold however
the work is divided. As a program it looks for a planted best reply with each kind of baseline and prints a table:

    python tests/test_rl.py
"""
import ast
import re
import sys
import time
from itertools import product
from pathlib import Path

import pytest
import tokenizers

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

import rl, sample                                                # noqa: E402
from model import Config, Qwen2                                 # noqa: E402
from sample import Tokenizer                                    # noqa: E402
from support.distributed import epoch_order, export_model, init_distributed, shard_across_ranks  # noqa: E402

import torch                                                    # noqa: E402
from torch.distributed.tensor import DTensor                    # noqa: E402
from support import cli, distributed

WIDTHS = dict(num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=512)
CPU = torch.device("cpu")
METHODS = {"own critic": {}, "shared critic": {"critic": "shared"}, "group baseline": {"advantage": "group"}}


def tokenizer_of(letters):
    """One token a letter, then the two that frame a turn."""
    bpe = tokenizers.Tokenizer(tokenizers.models.BPE({letter: i for i, letter in enumerate(letters)}, []))
    bpe.add_special_tokens([Tokenizer.TURN, Tokenizer.END])
    return Tokenizer(bpe)


def learner_of(config, size, spread=0.0, **settings):
    """A Learner with random weights; spread: of what is added to the actor's, to part it from the reference."""
    s = rl.Settings(**{"recompute": False, "clip": 1e9, **settings})
    learner = rl.Learner(s, config, None, size, 0, 1, CPU)
    add_noise(learner.actor, spread)
    return learner


def add_noise(model, spread, seed=0):
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p += spread * torch.randn(p.shape, generator=g)


class Plain:
    """Stands in for Adam: gradient descent that keeps each step's gradients, as {name: whole tensor}."""

    def __init__(self, learner, lr=0.0, critic_lr=0.0):
        self.named, self.steps = dict(learner.models.named_parameters()), []
        slow = {id(p) for p in learner.slow}
        self.rates = {name: lr if id(p) in slow else critic_lr for name, p in self.named.items()}
        learner.optimizer = self

    @torch.no_grad()
    def step(self):
        self.steps.append({name: distributed.full_tensor(p.grad).clone() for name, p in self.named.items() if p.grad is not None})
        for name, p in self.named.items():
            if p.grad is not None:
                p -= self.rates[name] * p.grad

    def zero_grad(self):
        for p in self.named.values():
            p.grad = None


def sample_of(prompt, tokens, reward, logps=(), group=0, chain=0, **step):
    step = {"reward": reward, "kind": "scored", "outcome": "ok", "action": "Execute Script", "valid": True} | step
    return rl.Sample(group=group, chain=chain, prompt=list(prompt), tokens=list(tokens), step=step, task="toy",
                     logps=list(logps) or [0.0] * len(tokens))


def logits_of(model, one, size, temperature=1.0):
    """Log-probs over all tokens, (N, size), where each of a sample's tokens was chosen: the whole forward pass."""
    logits = model(torch.tensor([one.prompt + one.tokens]))[0, len(one.prompt) - 1:-1, :size]
    return (logits / temperature).log_softmax(-1)


def logp_of(model, one, size, temperature=1.0):
    return logits_of(model, one, size, temperature).gather(1, torch.tensor(one.tokens)[:, None])[:, 0]      # (N,)


def assert_close(found, expected, tolerance=1e-6, floor=1e-6):
    """Each tensor of two dicts within a relative distance, of its norm."""
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert (found[name] - value).norm() <= tolerance * max(value.norm(), floor), name


# ---- five tokens: everything the policy can do is counted through

FIVE = Config(vocab_size=7, hidden_size=16, intermediate_size=24, num_hidden_layers=1, **WIDTHS)   # two rows to spare
PROMPTS, END = [[0, 3, 1], [2, 0, 0, 1, 3]], 4
ACTIONS = [[END]] + [[a, b] for a in range(4) for b in range(5)]       # the end at once, or two tokens


def all_actions(seed=3):
    """Every action after every prompt, with a random reward; a group and a chain for each prompt and action."""
    g = torch.Generator().manual_seed(seed)
    return [sample_of(prompt, action, torch.rand((), generator=g).item(), group=i, chain=i * len(ACTIONS) + j)
            for i, prompt in enumerate(PROMPTS) for j, action in enumerate(ACTIONS)]


def gradient_of(actor, value):
    """{name: gradient} of a function of the actor's exact probabilities."""
    grads = torch.autograd.grad(value, list(actor.parameters()))
    return {f"actor.{name}": grad for (name, _), grad in zip(actor.named_parameters(), grads)}


def expected(actor, samples, size=5):
    """Each prompt's exact expected reward, summed over the prompts, and the probabilities, whose sum must be theirs."""
    p = torch.stack([logp_of(actor, one, size).sum().exp() for one in samples])
    assert p.sum().item() == pytest.approx(len(PROMPTS), rel=1e-5)
    return (p * torch.tensor([one.step["reward"] for one in samples])).sum(), p.tolist()


def one_update(learner, samples, probabilities, advantages, returns=None, values=None):
    """The gradients of Learner.update at ratio 1, when every sample counts with its probability, and the number of
    tokens that the loss was divided by."""
    texts, plain = [one.text for one in samples], Plain(learner)
    old = learner.measure(texts, lambda *row: learner.act(*row)[0])
    weights = [torch.full_like(o, p) for o, p in zip(old, probabilities)]
    learner.update(texts, old, advantages, returns or old, values or old, weights, iteration=0)
    return {name: grad for name, grad in plain.steps[0].items() if name.startswith("actor.")}, sum(map(len, old))


def scaled(grads, factor):
    return {name: grad * factor for name, grad in grads.items()}


def test_the_gradient_is_that_of_the_expected_reward():
    learner = learner_of(FIVE, 5, spread=0.3, advantage="group", kl=0)
    samples = all_actions()
    value, probabilities = expected(learner.actor, samples)
    exact = gradient_of(learner.actor, value)
    found, num = one_update(learner, samples, probabilities,
                            [torch.full((len(one.tokens),), one.step["reward"]) for one in samples])
    assert_close(scaled(found, -num), exact, 1e-5)
    assert max(grad.norm() for grad in exact.values()) > 0.01


def test_values_of_states_and_whitening_leave_the_expected_gradient():
    """Any value of the tokens before may be taken from the return, and any constant; whitening then divides by the
    standard deviation."""
    learner = learner_of(FIVE, 5, spread=0.3, kl=0)
    samples = all_actions()
    value, probabilities = expected(learner.actor, samples)
    exact = gradient_of(learner.actor, value)
    values = [torch.tensor([0.3 * ((7 * sum(one.prompt) + 5 * sum(one.tokens[:t])) % 11 - 4)
                            for t in range(len(one.tokens))]) for one in samples]
    raw = torch.cat([one.step["reward"] - v for one, v in zip(samples, values)])
    spread = (sum((x - sum(raw.tolist()) / len(raw)) ** 2 for x in raw.tolist()) / len(raw)) ** 0.5
    advantages, returns = learner.advantages(samples, [torch.zeros(len(v)) for v in values], None, values)
    found, num = one_update(learner, samples, probabilities, advantages, returns, values)
    assert_close(scaled(found, -num * (spread + 1e-4)), exact, 1e-5)
    assert all(torch.allclose(r, torch.tensor(one.step["reward"])) for one, r in zip(samples, returns))


def test_the_other_actions_as_baseline_leave_the_expected_gradient():
    """All pairs of actions that a state can be given, each pair a group: twice the gradient of the expected reward."""
    learner = learner_of(FIVE, 5, spread=0.3, advantage="group", kl=0)
    single = all_actions()[:len(ACTIONS)]
    pairs = [sample_of(one.prompt, one.tokens, one.step["reward"], group=g, chain=2 * g + k)
             for g, pair in enumerate(product(single, single)) for k, one in enumerate(pair)]
    p = [logp_of(learner.actor, one, 5).sum().exp() for one in single]
    exact = gradient_of(learner.actor, sum(p_i * one.step["reward"] for p_i, one in zip(p, single)))
    advantages, _ = learner.advantages(pairs, [torch.zeros(len(one.tokens)) for one in pairs], None, None)
    assert advantages[2][0].item() == pytest.approx(single[0].step["reward"] - single[1].step["reward"])
    weights = [pair[0].item() * pair[1].item() for pair in product(p, p) for _ in range(2)]
    found, num = one_update(learner, pairs, weights, advantages)
    assert_close(scaled(found, -num / 2), exact, 1e-5)


@pytest.mark.parametrize("kl", [1.0, -1.0])
def test_a_step_on_divergence_alone_lowers_it(kl):
    """Without a reward the update is the gradient of the exact divergence from the reference, downwards; with the sign
    turned it goes upwards."""
    learner = learner_of(FIVE, 5, spread=0.2)
    learner.s.kl = kl
    samples = [sample_of(one.prompt, one.tokens, 0.0, chain=one.chain) for one in all_actions()]

    def divergence():
        both = [(logp_of(learner.actor, one, 5).sum(), logp_of(learner.reference, one, 5).sum()) for one in samples]
        return sum(a.exp() * (a - b) for a, b in both)

    before = divergence()
    exact = gradient_of(learner.actor, before)
    old, ref = ([logp_of(model, one, 5).detach() for one in samples] for model in (learner.actor, learner.reference))
    zeros = [torch.zeros_like(o) for o in old]
    advantages, returns = learner.advantages(samples, old, ref, zeros)
    spread = torch.cat(returns).std(correction=0).item() + 1e-4     # of what was whitened: the values are 0
    found, num = one_update(learner, samples, [o.sum().exp().item() for o in old], advantages, returns, zeros)
    assert_close(scaled(found, num * spread), scaled(exact, kl), 1e-4)
    with torch.no_grad():
        for name, p in learner.actor.named_parameters():
            p -= found[f"actor.{name}"]
    assert before > 0.01 and (divergence() < 0.99 * before if kl > 0 else divergence() > 1.01 * before)


# ---- advantages

def test_gae_by_hand():
    """deltas 0.5 * 0.25 - 0.5 = -0.375, 0.5 * 0.75 - 0.25 = 0.125, 1 - 0.75 = 0.25; each advantage is the delta and a
    quarter of the next advantage."""
    advantages, returns = rl.gae(torch.tensor([0.0, 0, 1]), torch.tensor([0.5, 0.25, 0.75]), gamma=0.5, lam=0.5)
    assert advantages.tolist() == [-0.328125, 0.1875, 0.25] and returns.tolist() == [0.171875, 0.4375, 1.0]


@pytest.mark.parametrize("gamma, lam", [(1.0, 1.0), (0.9, 0.7), (0.5, 0.0), (1.0, 0.3)])
def test_gae_is_the_discounted_sum_of_errors_along_a_chain(gamma, lam):
    """Two steps of one trajectory, 3 and 4 tokens, are one chain; a third sample is alone."""
    learner = learner_of(FIVE, 5, gamma=gamma, lam=lam, kl=0.5)
    samples = [sample_of([0], [1] * n, reward, chain=chain)
               for n, reward, chain in ((3, 0.4, 0), (4, 0.9, 0), (2, 0.1, 2))]
    g = torch.Generator().manual_seed(0)
    old, ref, values = ([torch.randn(len(one.tokens), generator=g) for one in samples] for _ in range(3))
    advantages, returns = learner.advantages(samples, old, ref, values)
    plain = []
    for chain in ([0, 1], [2]):
        r, v = [], []
        for i in chain:
            tokens = [-0.5 * (o - p) for o, p in zip(old[i].tolist(), ref[i].tolist())]
            r += [*tokens[:-1], tokens[-1] + samples[i].step["reward"]]
            v += values[i].tolist()
        delta = [r[t] + gamma * (v + [0.0])[t + 1] - v[t] for t in range(len(r))]
        plain += [sum((gamma * lam) ** k * delta[t + k] for k in range(len(r) - t)) for t in range(len(r))]
    plain = torch.tensor(plain)
    assert torch.allclose(torch.cat(returns), plain + torch.cat(values), atol=1e-6)
    white = (plain - plain.mean()) / plain.std(correction=0)
    assert torch.allclose(torch.cat(advantages), white, atol=1e-3)
    assert [len(a) for a in advantages] == [3, 4, 2]


def test_whitening_by_hand():
    x = rl.whiten(torch.tensor([1.0, 2.0, 3.0, 6.0]))       # mean 3, variance (4 + 1 + 0 + 9) / 4
    assert torch.allclose(x, torch.tensor([-2.0, -1.0, 0.0, 3.0]) / 3.5 ** 0.5, atol=1e-3)
    assert x.mean().abs() < 1e-6


def test_equal_rewards_teach_nothing():
    """No division by zero, and no rounding error blown up to the size of an advantage."""
    assert rl.whiten(torch.full((7,), 0.3)).abs().max() < 2e-3
    assert rl.whiten(0.3 + 1e-8 * torch.arange(7)).abs().max() < 2e-3
    learner = learner_of(FIVE, 5, advantage="group", kl=0)
    samples = [sample_of(PROMPTS[0], action, 0.7, group=0, chain=i) for i, action in enumerate(ACTIONS)]
    advantages, _ = learner.advantages(samples, [torch.zeros(len(a)) for a in ACTIONS], None, None)
    assert torch.cat(advantages).abs().max() < 1e-6


def test_importance_by_hand():
    log = lambda *values: torch.tensor(values).log()
    old, sampled = [log(0.5, 0.3), log(0.9)], [log(0.4, 0.6).tolist(), log(0.3).tolist()]
    assert torch.allclose(torch.cat(rl.importance(old, sampled, 2.0)), torch.tensor([1.25, 0.5, 2.0]))
    assert torch.allclose(torch.cat(rl.importance(old, sampled, 4.0)), torch.tensor([1.25, 0.5, 3.0]))
    assert torch.cat(rl.importance(old, sampled, 0)).tolist() == [1, 1, 1]


# ---- the losses

CLIPS = rl.Settings(clip_low=0.2, clip_high=0.3, dual_clip=3.0)


@pytest.mark.parametrize("advantage, ratio, loss, slope, cut", [
    (1, 0.5, -0.5, -0.5, False), (1, 0.79, -0.79, -0.79, False), (1, 0.9, -0.9, -0.9, False),
    (1, 1.0, -1.0, -1.0, False), (1, 1.29, -1.29, -1.29, False), (1, 1.31, -1.3, 0, True), (1, 5.0, -1.3, 0, True),
    (-2, 0.5, 1.6, 0, True), (-2, 0.79, 1.6, 0, True), (-2, 0.81, 1.62, 1.62, False), (-2, 1.0, 2.0, 2.0, False),
    (-2, 1.31, 2.62, 2.62, False), (-2, 2.9, 5.8, 5.8, False), (-2, 3.1, 6.0, 0, False), (-2, 50.0, 6.0, 0, False),
    (0, 0.5, 0, 0, False), (0, 2.0, 0, 0, False)])
def test_what_the_clips_cut_has_no_gradient(advantage, ratio, loss, slope, cut):
    """d loss / d log-prob is -ratio * advantage, or 0: a good action beyond 1.3, a bad one below 0.8 or beyond 3."""
    old = torch.tensor([-1.5])
    logp = (old + torch.tensor([ratio]).log()).requires_grad_()
    found, decided = rl.policy_loss(logp, old, torch.tensor([float(advantage)]), CLIPS)
    found.sum().backward()
    assert found.item() == pytest.approx(loss, rel=1e-5) and logp.grad.item() == pytest.approx(slope, rel=1e-5)
    assert decided.item() is cut


def test_ratios_beyond_all_bounds_stay_finite():
    old = torch.tensor([0.0, -1000.0, 0.0, -1000.0])
    logp = torch.tensor([-1000.0, 0.0, -1000.0, 0.0], requires_grad=True)
    loss, _ = rl.policy_loss(logp, old, torch.tensor([1.0, 1.0, -1.0, -1.0]), CLIPS)
    loss.sum().backward()
    assert torch.allclose(loss, torch.tensor([0.0, -1.3, 0.8, 3.0]), atol=1e-4) and not logp.grad.any()


@pytest.mark.parametrize("value, target, loss, slope", [
    (1.1, 2.0, 0.405, -0.9), (0.9, 0.0, 0.405, 0.9),        # near the old value: half the squared error
    (1.5, 2.0, 0.32, 0), (0.5, 0.0, 0.32, 0),               # moved far enough towards the target: that of 1.2 and 0.8
    (1.5, 0.0, 1.125, 1.5), (0.5, 2.0, 1.125, -1.5)])       # moved away from it: may come back
def test_a_value_that_has_moved_far_has_no_gradient(value, target, loss, slope):
    x = torch.tensor([value], requires_grad=True)
    found = rl.value_loss(x, torch.tensor([1.0]), torch.tensor([target]), 0.2)
    found.sum().backward()
    assert found.item() == pytest.approx(loss) and x.grad.item() == pytest.approx(slope)


# ---- an update

SMALL = Config(vocab_size=267, hidden_size=48, intermediate_size=88, num_hidden_layers=2, num_attention_heads=6,
               num_key_value_heads=2, max_position_embeddings=512)
SIZE = 259      # of the tokenizer of bytes


def some_samples(num=12, seed=0):
    """Two actions for each of some states, of 1 to 20 tokens after prompts of 5 to 60."""
    g = torch.Generator().manual_seed(seed)
    whole = lambda low, high, n=(): torch.randint(low, high, n, generator=g).tolist()
    found = []
    for i in range(num):
        prompt = found[-1].prompt if i % 2 else whole(0, SIZE, (whole(5, 60),))
        tokens = whole(0, SIZE, (whole(1, 20),))
        logps = (-5.56 + torch.randn(len(tokens), generator=g) / 2).tolist()
        found.append(sample_of(prompt, tokens, torch.rand((), generator=g).item(), logps, group=i // 2, chain=i))
    return found


def test_only_what_the_policy_chose_has_a_gradient():
    """Of the hidden states, those that an action's tokens were chosen from, the end of turn's among them; in both
    models. A prompt's have none."""
    learner, samples = learner_of(SMALL, SIZE), some_samples(4)
    texts, kept = [one.text for one in samples], {}
    for name, model in learner.models.items():
        model.model.norm.register_forward_hook(
            lambda m, i, o, name=name: (o.requires_grad and o.retain_grad(), kept.update({name: o})) and None)
    old = learner.measure(texts, lambda *row: learner.act(*row)[0])
    ones = [torch.ones_like(o) for o in old]
    add_noise(learner.critic.score, 0.01)       # at zero it hands nothing on
    kept.clear()
    learner.update(texts, old, ones, ones, [0 * o for o in ones], ones, 0)
    order = epoch_order(len(texts), 0, 0)
    expected = [place for i in order for place in texts[i][1][1:]]
    assert sum(expected) == sum(len(one.tokens) for one in samples)
    for name in ("actor", "critic"):
        assert (kept[name].grad[0].abs().sum(-1) > 0).tolist() == expected, name


@pytest.mark.parametrize("method", METHODS)
def test_an_update_and_its_figures_equal_a_plain_loop(method):
    """Sample by sample and token by token, from whole logits, with ratios far from 1."""
    learner = learner_of(SMALL, SIZE, spread=0.1, temperature=0.8, length=80, **METHODS[method])
    if "critic" in method:      # a head that is not zero
        add_noise((learner.critic or learner.actor).score, 0.2, seed=4)
    s, samples, g = learner.s, some_samples(), torch.Generator().manual_seed(2)
    with torch.no_grad():
        old = [logp_of(learner.actor, one, SIZE, 0.8) for one in samples]
    noise = lambda scale: [scale * torch.randn(len(one.tokens), generator=g) for one in samples]
    old, advantages, returns, values = [o + e for o, e in zip(old, noise(0.5))], noise(1), noise(1), noise(0.5)
    weights = [e.exp() for e in noise(0.3)]
    plain = Plain(learner)
    figures = learner.update([one.text for one in samples], old, advantages, returns, values, weights, 1)

    num, total, sums = sum(map(len, old)), 0, dict.fromkeys(("entropy", "clip_fraction", "policy_loss", "value_loss",
                                                             "value_clip_fraction"), 0.0)
    ratios = []
    for i, one in enumerate(samples):
        logq = logits_of(learner.actor, one, SIZE, 0.8)
        if "critic" in method:
            model = learner.critic or learner.actor
            at = model.hidden(torch.tensor([one.prompt + one.tokens]))[0, len(one.prompt) - 1:-1]
            value = at @ model.score.weight[0] + model.score.bias[0]
        for t, token in enumerate(one.tokens):
            ratio, a = (logq[t, token] - old[i][t]).exp(), advantages[i][t].item()
            if a > 0:
                gain, cut = (1.2 * a, True) if ratio > 1.2 else (ratio * a, False)
            else:
                gain, cut = (0.8 * a, True) if ratio < 0.8 else (ratio * a if ratio < 3 else 3 * a, False)
            ratios.append(ratio.item())
            loss = -weights[i][t] * gain / num
            total = total + loss
            sums["policy_loss"] += loss.item()
            sums["entropy"] -= (logq[t].exp() * logq[t]).sum().item() / num
            sums["clip_fraction"] += cut / num
            if "critic" in method:
                v, target = values[i][t].item(), returns[i][t].item()
                moved = v + 0.2 if value[t] > v + 0.2 else v - 0.2 if value[t] < v - 0.2 else value[t]
                error = torch.maximum((value[t] - target) ** 2, torch.as_tensor(moved - target) ** 2) / 2 / num
                total = total + error * (0.1 if method == "shared critic" else 1)
                sums["value_loss"] += error.item()
                sums["value_clip_fraction"] += (abs(value[t].item() - v) > 0.2) / num
    total.backward()
    assert_close(plain.steps[0], {name: p.grad for name, p in learner.models.named_parameters()}, 1e-5)
    assert {name: figures[name] for name in sums} == pytest.approx(sums, rel=1e-5)
    assert figures["ratio_max"] == pytest.approx(max(ratios), rel=1e-5)
    assert sum(r > 3 for r in ratios) and 0.1 < sums["clip_fraction"] < 0.6
    norm = lambda part: torch.stack([grad.norm() for name, grad in plain.steps[0].items()
                                     if name.startswith(part)]).norm().item()
    assert figures["grad_norm"] == pytest.approx(norm("actor."), rel=1e-5)
    assert figures["critic_grad_norm"] == pytest.approx(norm("critic." if learner.critic else "actor."), rel=1e-5)


def test_the_figures_of_samples_equal_a_plain_loop():
    learner = learner_of(SMALL, SIZE, spread=0.1)
    samples = some_samples()
    for one in samples[:3]:
        one.step |= {"kind": "invalid", "valid": False, "outcome": "", "action": "", "reward": 0.0}
    samples[4].step["reward"] = samples[5].step["reward"]
    samples[6].step |= {"action": "Replace In Script"}
    found = learner.step(samples, 0)
    with torch.no_grad():
        learner = learner_of(SMALL, SIZE, spread=0.1)
        logps = [[x for one in samples for x in logp_of(model, one, SIZE).tolist()]
                 for model in (learner.actor, learner.reference)]
    gaps = [abs(a - b) for a, b in zip(logps[0], [x for one in samples for x in one.logps])]
    d, num = [b - a for a, b in zip(*logps)], len(logps[0])
    rewards = [one.step["reward"] for one in samples]
    mean = sum(rewards) / 12
    plain = {"reward": mean, "reward_std": (sum((r - mean) ** 2 for r in rewards) / 12) ** 0.5, "reward_min": 0.0,
             "reward_max": max(rewards), "share_invalid": 0.25, "share_scored": 0.75, "valid": 0.75,
             "reward_edits": rewards[6], "equal_groups": 2 / 6, "action_tokens": num / 12, "truncated": 0.0,
             "gap_mean": sum(gaps) / num, "gap_max": max(gaps), "kl": -sum(d) / num,
             "kl_k3": sum(2.718281828 ** x - 1 - x for x in d) / num}
    assert {name: found[name] for name in plain} == pytest.approx(plain, rel=1e-4)


@pytest.mark.parametrize("method", list(METHODS)[:2])
def test_the_critic_begins_at_zero_and_warms_up_alone(method):
    """Its first values are 0; steps of the warm-up leave the policy bit for bit as it was, and bring the values to the
    returns although those are farther away than a value may move later."""
    learner = learner_of(SMALL, SIZE, value_steps=60, critic_lr=1e-2, kl=0, **METHODS[method])
    judge = learner.critic or (lambda *row: learner.act(*row)[2])
    samples = some_samples()
    for one in samples:
        one.step["reward"] = 0.7
    texts = [one.text for one in samples]
    values = learner.measure(texts, judge)
    assert not torch.cat(values).any()
    before = {name: p.detach().clone() for name, p in learner.actor.named_parameters()}
    old = [v - 5.6 for v in values]
    advantages, returns = learner.advantages(samples, old, None, values)
    learner.update(texts, old, advantages, returns, values, [v + 1 for v in values], 0, policy=False)
    assert all(torch.equal(p, before[name]) for name, p in learner.actor.named_parameters() if "score" not in name)
    assert torch.cat(learner.measure(texts, judge)).mean() == pytest.approx(0.7, abs=0.1)


def test_the_warm_up_comes_first_and_once():
    for iteration, steps, num in ((0, 3, 4), (1, 3, 1), (0, 0, 1)):
        learner = learner_of(SMALL, SIZE, value_steps=steps)
        plain = Plain(learner)
        learner.step(some_samples(4), iteration)
        moved = ["actor.model.norm.weight" in grads for grads in plain.steps]
        assert moved == [False] * (num - 1) + [True], (iteration, steps)


# ---- however the work is divided

def steps_of(method, rank=0, world=1, device=CPU, reverse=False, **settings):
    """(gradients of each step, figures) of one iteration: the warm-up and two passes over the same actions."""
    s = rl.Settings(**{"recompute": False, "clip": 1e9, "epochs": 2, "value_steps": 1, **METHODS[method], **settings})
    learner = rl.Learner(s, SMALL, None, SIZE, rank, world, device)
    plain, samples = Plain(learner, lr=1.0, critic_lr=0.02), some_samples()
    if reverse:
        samples = [one for _, one in sorted(enumerate(samples), key=lambda each: -each[1].group)]
        for i, one in enumerate(samples):
            one.group, one.chain = 5 - one.group, i
    return plain.steps, learner.step(samples, 0), learner


def assert_same(found, expected, tolerance=1e-6):
    assert len(found[0]) == len(expected[0])
    for a, b in zip(found[0], expected[0]):
        assert_close(a, b, tolerance, floor=1e-3)
    same = lambda figures: {name: value for name, value in figures.items() if value is not None}
    assert same(found[1]) == pytest.approx(same(expected[1]), rel=1e-5, abs=1e-6)


@pytest.mark.parametrize("method", METHODS)
def test_an_update_does_not_depend_on_rows_order_or_recomputation(method):
    whole = steps_of(method, length=10_000)
    assert len(whole[0]) == (2 if method == "group baseline" else 3) and whole[1]["ratio_max"] > 1.01
    for settings in ({"length": 200}, {"length": 80}, {"length": 90, "reverse": True}, {"recompute": True}):
        assert_same(steps_of(method, **settings), whole)


PIECES = ["Once upon", " a time there was", "\nno time at all"]


def gap(learner, engine, seed=0):
    """The largest difference between the sampler's and the trainer's log-probs of fresh samples, and these."""
    s = learner.s
    replies = engine.generate(PIECES, n=2, max_new_tokens=s.max_new_tokens, temperature=s.temperature, seed=seed)
    samples = [sample_of(engine.tokenizer.encode(piece), reply.tokens, j * 0.5, reply.logps, group=i, chain=2 * i + j)
               for i, (piece, group) in enumerate(zip(PIECES, replies)) for j, reply in enumerate(group)]
    old = learner.measure([one.text for one in samples], lambda *row: learner.act(*row)[0])
    return (torch.cat(old) - torch.cat([torch.tensor(one.logps) for one in samples])).abs().max().item(), samples


def gaps_after_updates(learner):
    """Of two rounds of sampling and learning, with the weights brought to the sampler in between; last without."""
    engine, refresh = rl.sampler(learner.s, learner, Tokenizer.of_bytes())
    found = []
    for iteration in range(2):
        each, samples = gap(learner, engine, iteration)
        found.append(each)
        learner.step(samples, iteration)
        refresh()
    found.append(gap(learner, engine, 7)[0])
    return found


SAMPLING = dict(temperature=0.7, lr=1e-2, critic_lr=1e-2, rows=4, max_new_tokens=12, context=64, recompute=False)


@pytest.mark.parametrize("method", METHODS)
def test_sampler_and_trainer_agree_before_and_after_updates(method):
    learner = learner_of(SMALL, SIZE, **SAMPLING, **METHODS[method])
    before = learner.actor.model.norm.weight.detach().clone()
    assert max(gaps_after_updates(learner)) < 1e-5
    assert (learner.actor.model.norm.weight - before).abs().max() > 1e-3


@pytest.mark.parametrize("method", METHODS)
def test_the_first_step_on_fresh_samples_has_ratio_1(method):
    """Nothing is clipped, and there is no divergence from the reference yet; after that step there is some."""
    learner = learner_of(SMALL, SIZE, **SAMPLING, **METHODS[method])
    engine, refresh = rl.sampler(learner.s, learner, Tokenizer.of_bytes())
    first = learner.step(gap(learner, engine)[1], 0)
    assert first["ratio_max"] == pytest.approx(1, abs=1e-5) and first["clip_fraction"] == 0
    assert first["kl"] == pytest.approx(0, abs=1e-5) and first["kl_k3"] == pytest.approx(0, abs=1e-9)
    refresh()
    later = learner.step(gap(learner, engine, seed=1)[1], 1)
    assert later["ratio_max"] == pytest.approx(1, abs=1e-5) and later["kl_k3"] > 0.01


def test_an_actor_that_computes_in_bf16_is_sampled_from_a_copy():
    """As on one GPU; sampler and trainer then differ by the rounding of other kernels, and the copy follows updates."""
    learner = learner_of(SMALL, SIZE, dtype="bfloat16", **SAMPLING)
    assert max(gaps_after_updates(learner)) < 0.05


WORLDS = {2: (120, list(METHODS)), 4: (90, ["shared critic"])}      # tokens of a row, methods


def one_of_several(folder):
    """What each of several processes does; the first saves the figures and the gaps, all of them export the actor."""
    rank, world, device = init_distributed()
    length, methods = WORLDS[world]
    found = {method: steps_of(method, rank, world, device, length=length) for method in methods}
    actor = found["shared critic"][2].actor
    assert any(isinstance(p, DTensor) for p in actor.parameters())
    export_model(actor, Tokenizer.of_bytes(), Path(folder, str(world)), torch.float32)
    learner = rl.Learner(rl.Settings(**SAMPLING), SMALL, None, SIZE, rank, world, device)
    gaps = gaps_after_updates(learner) if world == 2 else []
    figures = {method: each[:2] for method, each in found.items()}
    if rank == 0:
        torch.save((figures, gaps), Path(folder, f"{world}.pt"))
    torch.distributed.destroy_process_group()


def test_nothing_depends_on_the_number_of_processes(forks, tmp_path):
    """Gradients of all steps and all figures, some process having fewer rows than another; sampling from a whole copy
    of a sharded actor agrees with training; and what is exported is what one process has, without the critic's head."""
    for world in WORLDS:
        said = forks("import sys, test_rl; test_rl.one_of_several(sys.argv[1])", tmp_path, world=world)
        assert "Warning" not in said, said
    lengths = [len(one.prompt + one.tokens) - 1 for one in some_samples()]
    for world, (length, methods) in WORLDS.items():
        found, gaps = torch.load(tmp_path / f"{world}.pt")
        rows = [sum(map(bool, shard_across_ranks(lengths, epoch_order(12, 0, 0), rank, world, length))) for rank in range(world)]
        assert len(set(rows)) > 1
        for method in methods:
            alone = steps_of(method, length=10_000)
            assert_same(found[method], alone)
            if method == "shared critic":
                exported = Qwen2.from_pretrained(tmp_path / str(world))
                assert_close(dict(exported.named_parameters()), {
                    name: p.detach() for name, p in alone[2].actor.named_parameters() if "score." not in name})
        assert max(gaps, default=0) < 1e-5 and len(gaps) == (3 if world == 2 else 0)


def test_an_exported_actor_is_an_ordinary_folder(tmp_path):
    """After an update with a critic on its backbone: no head of the critic, the same probabilities here and in
    transformers."""
    learner = learner_of(SMALL, SIZE, lr=1e-2, critic_lr=1e-2, critic="shared")
    samples = some_samples(4)
    learner.step(samples, 0)
    assert learner.actor.score.weight.any()
    export_model(learner.actor, Tokenizer.of_bytes(), tmp_path, torch.float32)
    model, tokens = Qwen2.from_pretrained(tmp_path), torch.tensor([samples[0].prompt])
    assert not [name for name, _ in model.named_parameters() if "score" in name]
    with torch.no_grad():
        expected = learner.actor(tokens)
        assert torch.equal(model(tokens), expected) and Tokenizer.from_pretrained(tmp_path).size == SIZE
        transformers = pytest.importorskip("transformers")
        other = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
        assert torch.allclose(other(tokens).logits, expected, atol=1e-5)


# ---- a planted best reply

TEN = Config(vocab_size=16, hidden_size=32, intermediate_size=64, num_hidden_layers=1, **WIDTHS)
DIGITS = tokenizer_of("0123456789")
QUESTIONS = [[DIGITS.turn, 0, DIGITS.turn], [DIGITS.turn, 1, DIGITS.turn]]


def worth(question, text, ended):
    """1 for one digit and the end of the turn, which digit being the question's; 0 to 0.45 for other digits; else 0."""
    if len(text) != 1 or not ended:
        return 0.0
    digit = (int(text) - 3 * question) % 10
    return 1.0 if digit == 7 else 0.05 * digit


def expected_worth(model):
    """The policy's exact expected reward, mean over the questions; the best is 1."""
    with torch.no_grad():
        return sum(logp_of(model, sample_of(ids, [digit, DIGITS.end], 0.0), DIGITS.size).sum().exp().item()
                   * worth(i, str(digit), True) for i, ids in enumerate(QUESTIONS) for digit in range(10)) / 2


def find_best(seed, iterations=100, **method):
    """Learns from 32 replies to each question an iteration until the expected reward is 0.95 of the best: iterations,
    expected reward before and after. The divergence in the reward keeps it from settling on a good reply too early."""
    s = rl.Settings(lr=5e-3, critic_lr=5e-3, epochs=4, kl=0.03, max_new_tokens=3, rows=64, context=16, recompute=False,
                    seed=seed, **method)
    learner = rl.Learner(s, TEN, None, DIGITS.size, 0, 1, CPU)
    engine, refresh = rl.sampler(s, learner, DIGITS)
    before = expected_worth(learner.actor)
    for iteration in range(iterations):
        groups = engine.generate(QUESTIONS, n=32, max_new_tokens=s.max_new_tokens, seed=1000 * (100 * seed + iteration))
        replies = [(i, reply) for i, group in enumerate(groups) for reply in group]
        learner.step([sample_of(QUESTIONS[i], reply.tokens, worth(i, reply.text, reply.finish == "stop"), reply.logps,
                                group=i, chain=j) for j, (i, reply) in enumerate(replies)], iteration)
        refresh()
        if (after := expected_worth(learner.actor)) >= 0.95:
            break
    return iteration + 1, before, after


@pytest.mark.parametrize("method", METHODS)
def test_the_best_of_ten_replies_is_found(method):
    iterations, before, after = find_best(3, **METHODS[method])
    assert before < 0.05 and after >= 0.95 and iterations < 100


def test_values_of_whole_trajectories_may_move_as_far_as_their_returns_are_large(monkeypatch):
    limits, loss = [], rl.value_loss
    monkeypatch.setattr(rl, "value_loss", lambda *args: limits.append(args[3]) or loss(*args))
    for settings in ({"rollout": "step"}, {"rollout": "episode", "steps": 7}):
        learner_of(SMALL, SIZE, value_steps=0, value_clip=0.5, **settings).step(some_samples(2), 0)
    assert set(limits) == {0.5, 3.5}


# ---- settings

@pytest.mark.parametrize("bad", [
    {"rollout": "steps"}, {"advantage": "grpo"}, {"critic": "none"}, {"choose": "best"}, {"sandbox": "maybe"},
    {"iterations": 0}, {"num": 0}, {"epochs": 0}, {"temperature": 0.0}, {"max_new_tokens": 0}, {"length": 0},
    {"states": 3, "minibatches": 4}, {"advantage": "group", "num": 1}, {"advantage": "group", "rollout": "episode"},
    {"overlap": True, "rollout": "episode"}, {"choose": "learnable", "rollout": "episode"},
    {"choose": "learnable", "num": 1}, {"kl": -0.1}, {"truncate": -1.0}, {"lr": -1e-6}, {"value_steps": -1},
    {"clip_low": 1.5}, {"clip_high": -0.1}, {"dual_clip": 1.0}, {"gamma": 1.1}, {"lam": -0.1},
    {"context": 1024, "max_new_tokens": 1024}])
def test_settings_that_make_no_sense_are_refused_by_name(bad):
    with pytest.raises(ValueError, match="--" + list(bad)[0].replace("_", "-")):
        rl.Settings(**bad)


def test_settings_at_their_limits_are_taken():
    rl.Settings(kl=0, truncate=0, value_steps=0, clip_low=1.0, gamma=0.0, lam=0.0, minibatches=32, lr=0)
    rl.Settings(advantage="group", num=2, overlap=True, choose="learnable")


def test_a_preset_holds_where_no_flag_says_otherwise(capsys):
    s = cli.parse(rl.Settings, ["--preset", "7b", "--kl", "0.5"], rl.fill)
    assert (s.lr, s.critic_lr, s.recompute, s.kl) == (1e-6, 1e-5, True, 0.5)
    with pytest.raises(SystemExit):
        cli.parse(rl.Settings, ["--preset", "8b"], rl.fill)
    assert "there is no --preset 8b; there is tiny, 7b" in capsys.readouterr().err


def test_a_group_update_leaves_out_states_whose_actions_all_earned_the_same():
    """Their gradient is zero: with them or without, the sum over tokens is the same, and its denominator is not."""
    found = {}
    for skip in (True, False):
        learner = learner_of(SMALL, SIZE, advantage="group", kl=0.0, skip_equal=skip)
        samples = some_samples(6)
        for one in samples:
            one.step["reward"] = 0.25 if one.group == 0 else one.step["reward"]
        kept = [one for one in samples if one.group != 0]
        grads = {}
        learner.optimizer.step = lambda: grads.update(
            {name: p.grad.clone() for name, p in learner.actor.named_parameters()})
        figures = learner.step(samples, 0)
        found[skip] = grads, sum(len(one.tokens) for one in (kept if skip else samples))
        assert figures["reward"] == pytest.approx(sum(one.step["reward"] for one in samples) / len(samples))
    (fewer, num), (all_, total) = found[True], found[False]
    for name, grad in fewer.items():
        assert torch.allclose(grad * num, all_[name] * total, atol=1e-5), name


@pytest.mark.parametrize("name", ["sample", "eval", "sft", "rl"])
def test_every_setting_is_read(name):
    """Outside the class and its checks, in the script or in what it hands its settings to: as s.NAME, or quoted."""
    read = ""
    for path in [f"{name}.py", "env.py", *(f"support/{each}.py" for each in ("cli", "distributed", "miniature"))]:
        source = (HERE.parent / path).read_text().splitlines()
        cls = next((node for node in ast.parse("\n".join(source)).body if getattr(node, "name", "") == "Settings"), None)
        if cls:
            read += "\n".join(source[:cls.lineno - 1] + source[cls.end_lineno:])
            fields = [node.target.id for node in cls.body if isinstance(node, ast.AnnAssign)]
        else:
            read += "\n".join(source)
    assert len(fields) > 8
    holder = r"\b(s|cfg|self\.s|settings|values)\."
    assert not [field for field in fields if not re.search(rf'{holder}{field}\b|"{field}"', read)]


# ---- as a program

def main():
    print("Ten replies to each of two questions; the best is worth 1, the others 0 to 0.45, what is no such reply 0.\n"
          "64 samples an iteration, until the expected reward is 0.95.\n\n"
          f"{'method':<16}{'seed':>5}{'iterations':>12}{'seconds':>9}{'reward before':>15}{'after':>8}")
    torch.set_num_threads(1)
    for method, settings in METHODS.items():
        for seed in range(5):
            start = time.perf_counter()
            iterations, before, after = find_best(seed, **settings)
            seconds = time.perf_counter() - start
            print(f"{method:<16}{seed:>5}{iterations:>12}{seconds:>9.1f}{before:>15.3f}{after:>8.3f}", flush=True)


if __name__ == "__main__":
    main()
