"""PPO on toys that can be counted through: exact gradients, hand calculations, and equalities that must hold however
the work is divided. As a program it looks for a planted best reply with each kind of baseline and prints a table:

    python tests/test_rl.py
"""
import ast
import functools
import math
import re
import sys
import time
from itertools import product
from pathlib import Path

import pytest
import tokenizers

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

import rl                                                        # noqa: E402
from model import Config, Qwen2                                 # noqa: E402
from support.tokenizer import Tokenizer                         # noqa: E402
from support.distributed import export_model, init_distributed  # noqa: E402

import torch                                                    # noqa: E402
from torch.distributed.tensor import DTensor                    # noqa: E402
from support import cli, distributed, recipes, sampling

WIDTHS = dict(num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=512)
CPU = torch.device("cpu")
METHODS = {"critic": {}, "rloo": {"advantage": "rloo"}, "grpo": {"advantage": "grpo"}}


@pytest.fixture(autouse=True)
def unclipped(monkeypatch):
    """Gradients are compared as they are."""
    monkeypatch.setattr(rl, "optimizer_step", functools.partial(distributed.optimizer_step, max_norm=1e9))


def tokenizer_of(letters):
    """One token a letter, then the two that frame a turn."""
    bpe = tokenizers.Tokenizer(tokenizers.models.BPE({letter: i for i, letter in enumerate(letters)}, []))
    bpe.add_special_tokens([Tokenizer.TURN, Tokenizer.END])
    return Tokenizer(bpe)


def trainer_of(config, size, spread=0.0, device=CPU, **settings):
    """A PPOTrainer with random weights; spread: of what is added to the actor's, to part it from the reference."""
    trainer = rl.PPOTrainer(rl.Settings(**settings), config, None, size, device)
    if spread:
        add_noise(trainer.actor, spread)
    return trainer


class Given:
    """In place of a RolloutWorker: gives prepared transitions."""

    def __init__(self, transitions, engine=None):
        self.transitions = transitions
        self.engine = engine

    def sample_states(self, iteration):
        return []

    def run(self, names, iteration):
        return self.transitions, {}

    def samples_from(self, actor):
        return self.engine is not None and rl.RolloutWorker.samples_from(self, actor)

    def refresh(self, actor):
        if self.engine:
            rl.RolloutWorker.refresh(self, actor)


def learn(trainer, samples, iteration=0, engine=None):
    """The figures of one iteration on these samples; the engine gets the new weights."""
    return rl.iterate(trainer.cfg, Given(samples, engine), trainer, iteration)[1]


def estimate(trainer, samples, logp_old, logp_ref, values):
    """(advantages, returns) of each sample's tokens; without values the advantages twice."""
    cfg = trainer.cfg
    rewards = rl.token_rewards(samples, logp_old, logp_ref, cfg.kl)
    adv = rl.ADVANTAGES[cfg.advantage](samples, rewards, values, cfg.lam)
    if not values:
        return adv, adv
    return rl.whiten(adv), [a + v for a, v in zip(adv, values)]


def add_noise(model, spread, seed=0):
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p += spread * torch.randn(p.shape, generator=g)


class Plain:
    """Stands in for Adam: gradient descent that keeps each step's gradients, as {name: whole tensor}."""

    def __init__(self, trainer, lr=0.0, critic_lr=0.0):
        self.named = dict(trainer.models.named_parameters())
        self.rates = {name: lr if name.startswith("actor.") else critic_lr for name in self.named}
        self.steps = []
        self.state = {p: {"step": torch.zeros(())} for p in self.named.values()}
        trainer.optimizer = self

    @torch.no_grad()
    def step(self):
        grads = {name: p.grad for name, p in self.named.items() if p.grad is not None}
        self.steps.append({name: distributed.full_tensor(grad).clone() for name, grad in grads.items()})
        for state in self.state.values():
            state["step"] += 1
        for name, p in self.named.items():
            if p.grad is not None:
                p -= self.rates[name] * p.grad

    def zero_grad(self):
        for p in self.named.values():
            p.grad = None


def sample_of(prompt, tokens, reward, logps=(), group=0, episode_id=0, **step):
    step = {"reward": reward, "kind": "scored", "outcome": "ok", "action": "Execute Script", "valid": True} | step
    return rl.Transition("toy-0, step 0", group, episode_id, list(prompt), list(tokens),
                         list(logps) or [0.0] * len(tokens), step, [])


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


# -- five tokens: everything the policy can do is counted through

FIVE = Config(vocab_size=7, hidden_size=16, intermediate_size=24, num_hidden_layers=1, **WIDTHS)   # two rows to spare
PROMPTS = [[0, 3, 1], [2, 0, 0, 1, 3]]
END = 4
ACTIONS = [[END]] + [[a, b] for a in range(4) for b in range(5)]       # the end at once, or two tokens


def all_actions(seed=3):
    """Every action after every prompt, with a random reward; a group for each prompt and an episode for each action."""
    g = torch.Generator().manual_seed(seed)
    return [sample_of(prompt, action, torch.rand((), generator=g).item(), group=i, episode_id=i * len(ACTIONS) + j)
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


def one_update(trainer, samples, probabilities, adv):
    """The gradients of update_actor at ratio 1, when every sample counts with its probability, and the number of
    tokens that the loss was divided by."""
    examples = [one.example for one in samples]
    plain = Plain(trainer)
    logp_old = trainer.logprobs(trainer.actor, examples)
    weights = [torch.full_like(o, p) for o, p in zip(logp_old, probabilities)]
    trainer.update_actor(examples, logp_old, adv, weights, [list(range(len(examples)))])
    return plain.steps[0], sum(map(len, logp_old))


def scaled(grads, factor):
    return {name: grad * factor for name, grad in grads.items()}


def test_the_gradient_is_that_of_the_expected_reward():
    trainer = trainer_of(FIVE, 5, spread=0.3, advantage="rloo", kl=0)
    samples = all_actions()
    value, probabilities = expected(trainer.actor, samples)
    exact = gradient_of(trainer.actor, value)
    found, num = one_update(trainer, samples, probabilities,
                            [torch.full((len(one.tokens),), one.step["reward"]) for one in samples])
    assert_close(scaled(found, -num), exact, 1e-5)
    assert max(grad.norm() for grad in exact.values()) > 0.01


def test_values_of_states_and_whitening_leave_the_expected_gradient():
    """Any value of the tokens before may be taken from the return, and any constant; whitening then divides by the
    standard deviation."""
    trainer = trainer_of(FIVE, 5, spread=0.3, kl=0)
    samples = all_actions()
    value, probabilities = expected(trainer.actor, samples)
    exact = gradient_of(trainer.actor, value)
    values = [torch.tensor([0.3 * ((7 * sum(one.prompt) + 5 * sum(one.tokens[:t])) % 11 - 4)
                            for t in range(len(one.tokens))]) for one in samples]
    raw = torch.cat([one.step["reward"] - v for one, v in zip(samples, values)])
    spread = (sum((x - sum(raw.tolist()) / len(raw)) ** 2 for x in raw.tolist()) / len(raw)) ** 0.5
    advantages, returns = estimate(trainer, samples, [torch.zeros(len(v)) for v in values], None, values)
    found, num = one_update(trainer, samples, probabilities, advantages)
    assert_close(scaled(found, -num * (spread + 1e-4)), exact, 1e-5)
    assert all(torch.allclose(r, torch.tensor(one.step["reward"])) for one, r in zip(samples, returns))


def test_the_other_actions_as_baseline_leave_the_expected_gradient():
    """All pairs of actions that a state can be given, each pair a group: twice the gradient of the expected reward."""
    trainer = trainer_of(FIVE, 5, spread=0.3, advantage="rloo", kl=0)
    single = all_actions()[:len(ACTIONS)]
    pairs = [sample_of(one.prompt, one.tokens, one.step["reward"], group=g, episode_id=2 * g + k)
             for g, pair in enumerate(product(single, single)) for k, one in enumerate(pair)]
    p = [logp_of(trainer.actor, one, 5).sum().exp() for one in single]
    exact = gradient_of(trainer.actor, sum(p_i * one.step["reward"] for p_i, one in zip(p, single)))
    advantages, _ = estimate(trainer, pairs, [torch.zeros(len(one.tokens)) for one in pairs], None, None)
    assert advantages[2][0].item() == pytest.approx(single[0].step["reward"] - single[1].step["reward"])
    weights = [pair[0].item() * pair[1].item() for pair in product(p, p) for _ in range(2)]
    found, num = one_update(trainer, pairs, weights, advantages)
    assert_close(scaled(found, -num / 2), exact, 1e-5)


@pytest.mark.parametrize("kl", [1.0, -1.0])
def test_a_step_on_divergence_alone_lowers_it(kl):
    """Without a reward the update is the gradient of the exact divergence from the reference, downwards; with the sign
    turned it goes upwards."""
    trainer = trainer_of(FIVE, 5, spread=0.2)
    trainer.cfg.kl = kl
    samples = [sample_of(one.prompt, one.tokens, 0.0, episode_id=one.episode_id) for one in all_actions()]

    def divergence():
        both = [(logp_of(trainer.actor, one, 5).sum(), logp_of(trainer.reference, one, 5).sum()) for one in samples]
        return sum(a.exp() * (a - b) for a, b in both)

    before = divergence()
    exact = gradient_of(trainer.actor, before)
    old, ref = ([logp_of(model, one, 5).detach() for one in samples] for model in (trainer.actor, trainer.reference))
    zeros = [torch.zeros_like(o) for o in old]
    advantages, returns = estimate(trainer, samples, old, ref, zeros)
    spread = torch.cat(returns).std(correction=0).item() + 1e-4     # of what was whitened: the values are 0
    found, num = one_update(trainer, samples, [o.sum().exp().item() for o in old], advantages)
    assert_close(scaled(found, num * spread), scaled(exact, kl), 1e-4)
    with torch.no_grad():
        for name, p in trainer.actor.named_parameters():
            p -= found[f"actor.{name}"]
    assert before > 0.01 and (divergence() < 0.99 * before if kl > 0 else divergence() > 1.01 * before)


def test_divergence_by_hand():
    """Half the squares of 0, ln 2 and -2 ln 2."""
    logp = -math.log(2) * torch.tensor([1.0, 1.0, 3.0])
    logp_ref = -math.log(2) * torch.tensor([1.0, 2.0, 1.0])
    expected = [0, 0.5 * math.log(2) ** 2, 2 * math.log(2) ** 2]
    assert rl.divergence(logp, logp_ref).tolist() == pytest.approx(expected)


@pytest.mark.parametrize("advantage", ["rloo", "grpo"])
def test_where_groups_are_compared_the_loss_holds_the_divergence(advantage):
    """All actions earned the same, so their advantages are 0; the gradient is that of --kl times the estimate, by
    plain autograd. A policy on which a whole group agrees is so brought back to the reference, too."""
    trainer = trainer_of(FIVE, 5, spread=0.2, advantage=advantage, kl=0.7)
    samples = [sample_of(one.prompt, one.tokens, 0.5, group=one.group, episode_id=one.episode_id)
               for one in all_actions()]
    ratios = [logp_of(trainer.actor, one, 5) - logp_of(trainer.reference, one, 5).detach() for one in samples]
    exact = gradient_of(trainer.actor, 0.7 * sum((ratio ** 2).sum() / 2 for ratio in ratios) / sum(map(len, ratios)))
    plain = Plain(trainer)
    figures = learn(trainer, samples)
    assert_close(plain.steps[0], exact, 1e-4)
    assert figures["kl_k3"] > 0.001 and abs(figures["policy_loss"]) < 1e-6


def test_the_mean_gradient_of_the_divergence_is_that_of_the_exact_one():
    """Over single tokens, each with its probability."""
    trainer = trainer_of(FIVE, 5, spread=0.2)
    tokens = [sample_of(prompt, [token], 0.0) for prompt in PROMPTS for token in range(5)]
    logp = torch.cat([logp_of(trainer.actor, one, 5) for one in tokens])
    logp_ref = torch.cat([logp_of(trainer.reference, one, 5) for one in tokens]).detach()
    exact = gradient_of(trainer.actor, (logp.exp() * (logp - logp_ref)).sum())
    logp = torch.cat([logp_of(trainer.actor, one, 5) for one in tokens])
    found = gradient_of(trainer.actor, (logp.detach().exp() * rl.divergence(logp, logp_ref)).sum())
    assert_close(found, exact, 1e-5)


# -- advantages

def test_gae_by_hand():
    """deltas 0.5 * 0.25 - 0.5 = -0.375, 0.5 * 0.75 - 0.25 = 0.125, 1 - 0.75 = 0.25; each advantage is the delta and a
    quarter of the next advantage."""
    advantages = rl.gae(torch.tensor([0.0, 0, 1]), torch.tensor([0.5, 0.25, 0.75]), gamma=0.5, lam=0.5)
    assert advantages.tolist() == [-0.328125, 0.1875, 0.25]


# Two states: actions of rewards 1, 0.5 and 0 in the one, 0.25 and 0.75 in the other; the first has two tokens.
GROUPS = [(1.0, 2, 0), (0.5, 1, 0), (0.0, 1, 0), (0.25, 1, 1), (0.75, 1, 1)]      # reward, tokens, group


def by_hand(advantage):
    samples = [sample_of([0], [1] * n, reward, group=group, episode_id=i)
               for i, (reward, n, group) in enumerate(GROUPS)]
    rewards = rl.token_rewards(samples, [torch.zeros(n) for _, n, _ in GROUPS], None, 0.0)
    assert [r.tolist() for r in rewards] == [[0, 1], [0.5], [0], [0.25], [0.75]]
    return [a.tolist() for a in rl.ADVANTAGES[advantage](samples, rewards, None, 1.0)]


def test_rloo_by_hand():
    """The baselines are the means of the others: 0.25, 0.5 and 0.75 in the first state, 0.75 and 0.25 in the second."""
    assert by_hand("rloo") == [[0.75, 0.75], [0], [-0.75], [-0.5], [0.5]]


def test_trajectories_are_compared_from_the_same_step_on():
    """Two from one start: rewards of 1 and 0.5, and of 0.25 alone. From the first step on they earned 1.5 and 0.25,
    from the second 0.5 and nothing."""
    samples = [sample_of([0], [1], 1.0), sample_of([0], [1, 1], 0.5), sample_of([0], [1], 0.25, episode_id=1)]
    rewards = rl.token_rewards(samples, [torch.zeros(len(one.tokens)) for one in samples], None, 0.0)
    assert [adv.tolist() for adv in rl.rloo(samples, rewards, None, 1.0)] == [[1.25], [0.5, 0.5], [-1.25]]
    first, second, _ = (adv[0].item() for adv in rl.grpo(samples, rewards, None, 1.0))
    assert (first, second) == pytest.approx((0.625 / 0.6251, 0.25 / 0.2501))
    assert rl.group_rewards(samples) == {0: [1.5, 0.25]}


def test_grpo_by_hand():
    """The baselines are the mean returns, both 0.5; the variances are 1/6 and 1/16."""
    first = (1 / 6) ** 0.5 + 1e-4
    second = 0.25 + 1e-4
    plain = [[0.5 / first, 0.5 / first], [0], [-0.5 / first], [-0.25 / second], [0.25 / second]]
    for adv, expected_adv in zip(by_hand("grpo"), plain):
        assert adv == pytest.approx(expected_adv)


@pytest.mark.parametrize("lam", [1.0, 0.7, 0.0])
def test_gae_is_the_discounted_sum_of_errors_along_an_episode(lam):
    """Two steps of one trajectory, 3 and 4 tokens, are one episode; a third sample is alone."""
    trainer = trainer_of(FIVE, 5, lam=lam, kl=0.5)
    samples = [sample_of([0], [1] * n, reward, episode_id=episode_id)
               for n, reward, episode_id in ((3, 0.4, 0), (4, 0.9, 0), (2, 0.1, 2))]
    g = torch.Generator().manual_seed(0)
    old, ref, values = ([torch.randn(len(one.tokens), generator=g) for one in samples] for _ in range(3))
    advantages, returns = estimate(trainer, samples, old, ref, values)
    plain = []
    for episode in ([0, 1], [2]):
        r = []
        v = []
        for i in episode:
            tokens = [-0.5 * (o - p) for o, p in zip(old[i].tolist(), ref[i].tolist())]
            r += [*tokens[:-1], tokens[-1] + samples[i].step["reward"]]
            v += values[i].tolist()
        delta = [r[t] + (v + [0.0])[t + 1] - v[t] for t in range(len(r))]
        plain += [sum(lam ** k * delta[t + k] for k in range(len(r) - t)) for t in range(len(r))]
    plain = torch.tensor(plain)
    assert torch.allclose(torch.cat(returns), plain + torch.cat(values), atol=1e-6)
    white = (plain - plain.mean()) / plain.std(correction=0)
    assert torch.allclose(torch.cat(advantages), white, atol=1e-3)
    assert [len(a) for a in advantages] == [3, 4, 2]


def test_whitening_by_hand():
    x = torch.cat(rl.whiten([torch.tensor([1.0, 2.0]), torch.tensor([3.0, 6.0])]))
    # the mean is 3 and the variance (4 + 1 + 0 + 9) / 4
    assert torch.allclose(x, torch.tensor([-2.0, -1.0, 0.0, 3.0]) / 3.5 ** 0.5, atol=1e-3)
    assert x.mean().abs() < 1e-6


def test_equal_rewards_teach_nothing():
    """No division by zero, and no rounding error blown up to the size of an advantage."""
    assert rl.whiten([torch.full((7,), 0.3)])[0].abs().max() < 2e-3
    assert rl.whiten([0.3 + 1e-8 * torch.arange(7)])[0].abs().max() < 2e-3
    trainer = trainer_of(FIVE, 5, advantage="rloo", kl=0)
    samples = [sample_of(PROMPTS[0], action, 0.7, group=0, episode_id=i) for i, action in enumerate(ACTIONS)]
    advantages, _ = estimate(trainer, samples, [torch.zeros(len(a)) for a in ACTIONS], None, None)
    assert torch.cat(advantages).abs().max() < 1e-6


def test_importance_by_hand():
    log = lambda *values: torch.tensor(values).log()
    old = [log(0.5, 0.3), log(0.9)]
    sampled = [log(0.4, 0.6), log(0.3)]
    assert torch.allclose(torch.cat(rl.importance_weights(old, sampled)), torch.tensor([1.25, 0.5, 2.0]))
    assert torch.allclose(torch.cat(rl.importance_weights(old, sampled, 4.0)), torch.tensor([1.25, 0.5, 3.0]))


# -- the losses

CLIPS = 0.2, 0.3         # lower and upper; and 3 for bad actions


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
    found, decided = rl.policy_loss(logp, old, torch.tensor([float(advantage)]), *CLIPS)
    found.sum().backward()
    assert found.item() == pytest.approx(loss, rel=1e-5) and logp.grad.item() == pytest.approx(slope, rel=1e-5)
    assert decided.item() is cut


def test_ratios_beyond_all_bounds_stay_finite():
    old = torch.tensor([0.0, -1000.0, 0.0, -1000.0])
    logp = torch.tensor([-1000.0, 0.0, -1000.0, 0.0], requires_grad=True)
    loss, _ = rl.policy_loss(logp, old, torch.tensor([1.0, 1.0, -1.0, -1.0]), *CLIPS)
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


# -- an update

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
        found.append(sample_of(prompt, tokens, torch.rand((), generator=g).item(), logps, group=i // 2, episode_id=i))
    return found


def test_only_what_the_policy_chose_has_a_gradient():
    """Of the hidden states, those that an action's tokens were chosen from, the end of turn's among them; in both
    models. A prompt's have none."""
    trainer = trainer_of(SMALL, SIZE)
    samples = some_samples(4)
    examples = [one.example for one in samples]
    kept = {}
    for name, model in trainer.models.items():
        model.model.norm.register_forward_hook(
            lambda m, i, o, name=name: (o.requires_grad and o.retain_grad(), kept.update({name: o})) and None)
    old = trainer.logprobs(trainer.actor, examples)
    ones = [torch.ones_like(o) for o in old]
    add_noise(trainer.critic.score, 0.01)       # at zero it hands nothing on
    kept.clear()
    batches = [list(range(len(examples)))]
    trainer.update_actor(examples, old, ones, ones, batches)
    trainer.update_critic(examples, ones, [0 * o for o in ones], batches)
    expected = []
    for one, other in sorted([samples[:2], samples[2:]], key=lambda pair: pair[0].prompt):
        expected += [False] * (len(one.prompt) - 1)      # of the two, whose prompt is one; then their actions
        expected += [True] * (len(one.tokens) + len(other.tokens))
    assert sum(expected) == sum(len(one.tokens) for one in samples)
    for name in ("actor", "critic"):
        assert (kept[name].grad[0].abs().sum(-1) > 0).tolist() == expected, name


def test_a_token_of_luck_has_no_advantage():
    """The others of its action keep theirs, and the divergence counts it still."""
    trainer = trainer_of(SMALL, SIZE, spread=0.1, advantage="rloo", kl=0.1)
    samples = some_samples(4)
    for one in samples:
        one.luck = [0]
    plain, _ = estimate(trainer, samples, [torch.zeros(len(one.tokens)) for one in samples], None, None)
    given = []

    def update(examples, logp_old, adv, is_weight, batches, logp_ref):
        given.extend([adv, logp_ref])
        return {}
    trainer.update_actor = update
    learn(trainer, samples)
    adv, logp_ref = given
    for one, before, after, ref in zip(samples, plain, adv, logp_ref):
        assert before[0] != 0 == after[0] and torch.equal(before[1:], after[1:])
        assert len(ref) == len(one.tokens)


@pytest.mark.parametrize("method", METHODS)
def test_an_update_and_its_figures_equal_a_plain_loop(method):
    """Sample by sample and token by token, from whole logits, with ratios far from 1."""
    trainer = trainer_of(SMALL, SIZE, spread=0.1, temperature=0.8, max_row_tokens=80, **METHODS[method])
    if trainer.critic:      # a head that is not zero
        add_noise(trainer.critic.score, 0.2, seed=4)
    samples = some_samples()
    g = torch.Generator().manual_seed(2)
    with torch.no_grad():
        old = [logp_of(trainer.actor, one, SIZE, 0.8) for one in samples]
    noise = lambda scale: [scale * torch.randn(len(one.tokens), generator=g) for one in samples]
    old = [o + e for o, e in zip(old, noise(0.5))]
    advantages = noise(1)
    returns = noise(1)
    values = noise(0.5)
    weights = [e.exp() for e in noise(0.3)]
    plain = Plain(trainer)
    examples = [one.example for one in samples]
    batches = [list(range(len(examples)))]
    figures = trainer.update_actor(examples, old, advantages, weights, batches)
    grads = plain.steps[0]
    if trainer.critic:
        figures |= trainer.update_critic(examples, returns, values, batches, 0.2)
        grads |= plain.steps[1]

    num = sum(map(len, old))
    total = 0
    names = ["entropy", "clip_fraction", "policy_loss"]
    if trainer.critic:
        names += ["value_loss", "value_clip_fraction"]
    sums = dict.fromkeys(names, 0.0)
    ratios = []
    for i, one in enumerate(samples):
        logq = logits_of(trainer.actor, one, SIZE, 0.8)
        if trainer.critic:
            model = trainer.critic
            at = model.hidden_states(torch.tensor([one.prompt + one.tokens]))[0, len(one.prompt) - 1:-1]
            value = at @ model.score.weight[0] + model.score.bias[0]
        for t, token in enumerate(one.tokens):
            ratio = (logq[t, token] - old[i][t]).exp()
            a = advantages[i][t].item()
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
            if trainer.critic:
                v = values[i][t].item()
                target = returns[i][t].item()
                moved = v + 0.2 if value[t] > v + 0.2 else v - 0.2 if value[t] < v - 0.2 else value[t]
                error = torch.maximum((value[t] - target) ** 2, torch.as_tensor(moved - target) ** 2) / 2 / num
                total = total + error
                sums["value_loss"] += error.item()
                sums["value_clip_fraction"] += (abs(value[t].item() - v) > 0.2) / num
    total.backward()
    assert_close(grads, {name: p.grad for name, p in trainer.models.named_parameters()}, 1e-5)
    assert {name: figures[name] for name in sums} == pytest.approx(sums, rel=1e-5)
    assert figures["ratio_max"] == pytest.approx(max(ratios), rel=1e-5)
    assert sum(r > 3 for r in ratios) and 0.1 < sums["clip_fraction"] < 0.6
    norm = lambda part: torch.stack([grad.norm() for name, grad in grads.items()
                                     if name.startswith(part)]).norm().item()
    assert figures["grad_norm"] == pytest.approx(norm("actor."), rel=1e-5)


def test_the_figures_of_samples_equal_a_plain_loop():
    trainer = trainer_of(SMALL, SIZE, spread=0.1)
    samples = some_samples()
    for one in samples[:3]:
        one.step |= {"kind": "invalid", "valid": False, "outcome": "", "action": "", "reward": 0.0}
    samples[4].step["reward"] = samples[5].step["reward"]
    samples[6].step |= {"action": "Replace In Script"}
    found = learn(trainer, samples)
    with torch.no_grad():
        trainer = trainer_of(SMALL, SIZE, spread=0.1)
        logps = [[x for one in samples for x in logp_of(model, one, SIZE).tolist()]
                 for model in (trainer.actor, trainer.reference)]
    gaps = [abs(a - b) for a, b in zip(logps[0], [x for one in samples for x in one.logp_sampler])]
    d = [b - a for a, b in zip(*logps)]
    num = len(logps[0])
    rewards = [one.step["reward"] for one in samples]
    mean = sum(rewards) / 12
    plain = {"reward": mean, "reward_std": (sum((r - mean) ** 2 for r in rewards) / 12) ** 0.5, "reward_min": 0.0,
             "reward_max": max(rewards), "share_invalid": 0.25, "share_scored": 0.75, "valid": 0.75,
             "reward_edits": rewards[6], "zero_variance_groups": 2 / 6, "action_tokens": num / 12, "truncated": 0.0,
             "logp_diff_mean": sum(gaps) / num, "logp_diff_max": max(gaps), "kl": -sum(d) / num,
             "kl_k3": sum(2.718281828 ** x - 1 - x for x in d) / num}
    assert {name: found[name] for name in plain} == pytest.approx(plain, rel=1e-4)


def test_the_critic_begins_at_zero_and_warms_up_alone():
    """Its first values are 0; steps of the warm-up leave the policy bit for bit as it was, and bring the values to the
    returns although those are farther away than a value may move later."""
    trainer = trainer_of(SMALL, SIZE, critic_lr=1e-2, kl=0)
    examples = [one.example for one in some_samples()]
    values = trainer.values(examples)
    assert not torch.cat(values).any()
    before = {name: p.detach().clone() for name, p in trainer.actor.named_parameters()}
    trainer.update_critic(examples, [v + 0.7 for v in values], values, [list(range(len(examples)))] * 60)
    assert all(torch.equal(p, before[name]) for name, p in trainer.actor.named_parameters())
    assert torch.cat(trainer.values(examples)).mean() == pytest.approx(0.7, abs=0.1)


def test_the_warm_up_comes_first_and_once(monkeypatch):
    for iteration, steps, num in ((0, 3, 4), (1, 3, 1), (0, 0, 0)):     # num: steps of the critic, 1 of the update
        monkeypatch.setattr(rl, "WARM_UP_STEPS", steps or 1)
        trainer = trainer_of(SMALL, SIZE, advantage="gae" if steps else "rloo")
        plain = Plain(trainer)
        learn(trainer, some_samples(4), iteration)
        of_actor = ["actor.model.norm.weight" in grads for grads in plain.steps]
        assert of_actor == [False] * num + [True], (iteration, steps)


# -- however the work is divided

def steps_of(method, device=CPU, reverse=False, **settings):
    """(gradients of each step, figures) of one iteration: the warm-up and two passes over the same actions."""
    trainer = trainer_of(SMALL, SIZE, 0.0, device, **{"epochs": 2, **METHODS[method], **settings})
    plain = Plain(trainer, lr=1.0, critic_lr=0.02)
    samples = some_samples()
    if reverse:
        samples = [one for _, one in sorted(enumerate(samples), key=lambda each: -each[1].group)]
        for i, one in enumerate(samples):
            one.group = 5 - one.group
            one.episode_id = i
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rl, "WARM_UP_STEPS", 1)
        patch.setattr(rl, "optimizer_step", functools.partial(distributed.optimizer_step, max_norm=1e9))
        return plain.steps, learn(trainer, samples), trainer


def assert_same(found, expected, tolerance=1e-6):
    assert len(found[0]) == len(expected[0])
    for a, b in zip(found[0], expected[0]):
        assert_close(a, b, tolerance, floor=1e-3)
    same = lambda figures: {name: value for name, value in figures.items()
                            if isinstance(value, float) and name != "logprobs_s"}
    assert found[1]["reward_of_tasks"] == pytest.approx(expected[1]["reward_of_tasks"])
    assert same(found[1]) == pytest.approx(same(expected[1]), rel=1e-5, abs=1e-6)


@pytest.mark.parametrize("method", METHODS)
def test_an_update_does_not_depend_on_rows_order_or_recomputation(method, monkeypatch):
    whole = steps_of(method, max_row_tokens=10_000)
    assert len(whole[0]) == (5 if method == "critic" else 2) and whole[1]["ratio_max"] > 1.01
    for settings in ({"max_row_tokens": 200}, {"max_row_tokens": 80}, {"max_row_tokens": 90, "reverse": True}):
        assert_same(steps_of(method, **settings), whole)
    monkeypatch.setattr(distributed, "RECOMPUTE_ABOVE", 0)
    assert_same(steps_of(method), whole)


PIECES = ["Once upon", " a time there was", "\nno time at all"]


def gap(trainer, engine, seed=0):
    """The largest difference between the sampler's and the trainer's log-probs of fresh samples, and these."""
    cfg = trainer.cfg
    replies = engine.generate(PIECES, n=2, max_new_tokens=cfg.max_new_tokens, temperature=cfg.temperature, seed=seed)
    samples = [sample_of(engine.tokenizer.encode(piece), reply.tokens, j * 0.5, reply.logps, group=i,
                         episode_id=2 * i + j)
               for i, (piece, group) in enumerate(zip(PIECES, replies)) for j, reply in enumerate(group)]
    old = trainer.logprobs(trainer.actor, [one.example for one in samples])
    return (torch.cat(old) - torch.cat([torch.tensor(one.logp_sampler) for one in samples])).abs().max().item(), samples


def gaps_after_updates(trainer):
    """Of two rounds of sampling and learning, with the weights brought to the sampler in between; last without."""
    engine = sampling.make_engine(trainer.cfg, trainer.actor, Tokenizer.of_bytes())
    found = []
    for iteration in range(2):
        each, samples = gap(trainer, engine, iteration)
        found.append(each)
        learn(trainer, samples, iteration, engine)
    found.append(gap(trainer, engine, 7)[0])
    return found


SAMPLING = dict(temperature=0.7, lr=1e-2, critic_lr=1e-2, max_batch=4, max_new_tokens=12, context=64)


@pytest.mark.parametrize("method", METHODS)
def test_sampler_and_trainer_agree_before_and_after_updates(method):
    trainer = trainer_of(SMALL, SIZE, **SAMPLING, **METHODS[method])
    before = trainer.actor.model.norm.weight.detach().clone()
    assert max(gaps_after_updates(trainer)) < 1e-5
    assert (trainer.actor.model.norm.weight - before).abs().max() > 1e-3


@pytest.mark.parametrize("method", METHODS)
def test_the_first_step_on_fresh_samples_has_ratio_1(method):
    """Nothing is clipped, and there is no divergence from the reference yet; after that step there is some."""
    trainer = trainer_of(SMALL, SIZE, **SAMPLING, **METHODS[method])
    engine = sampling.make_engine(trainer.cfg, trainer.actor, Tokenizer.of_bytes())
    first = learn(trainer, gap(trainer, engine)[1], 0, engine)
    assert first["ratio_max"] == pytest.approx(1, abs=1e-5) and first["clip_fraction"] == 0
    assert first["kl"] == pytest.approx(0, abs=1e-5) and first["kl_k3"] == pytest.approx(0, abs=1e-9)
    later = learn(trainer, gap(trainer, engine, seed=1)[1], 1, engine)
    assert later["ratio_max"] == pytest.approx(1, abs=1e-5) and later["kl_k3"] > 0.01


def test_an_actor_that_computes_in_bf16_is_sampled_from_a_copy():
    """As on one GPU; sampler and trainer then differ by the rounding of other kernels, and the copy follows updates."""
    trainer = trainer_of(SMALL, SIZE, dtype="bfloat16", **SAMPLING)
    assert max(gaps_after_updates(trainer)) < 0.05


WORLDS = {2: (160, list(METHODS)), 4: (90, ["critic"])}      # tokens of a row, methods


def one_of_several(folder):
    """What each of several processes does; the first saves the figures and the gaps, all of them export the actor."""
    rank, world, device = init_distributed()
    length, methods = WORLDS[world]
    found = {method: steps_of(method, device, max_row_tokens=length) for method in methods}
    actor = found["critic"][2].actor
    assert any(isinstance(p, DTensor) for p in actor.parameters())
    export_model(actor, Tokenizer.of_bytes(), Path(folder, str(world)))
    trainer = trainer_of(SMALL, SIZE, 0.0, device, **SAMPLING)
    gaps = gaps_after_updates(trainer) if world == 2 else []
    figures = {method: each[:2] for method, each in found.items()}
    if rank == 0:
        torch.save((figures, gaps), Path(folder, f"{world}.pt"))
    torch.distributed.destroy_process_group()


def test_nothing_depends_on_the_number_of_processes(forks, tmp_path):
    """Gradients of all steps and all figures, some process having fewer tokens than another; sampling from a whole copy
    of a sharded actor agrees with training; and what is exported is what one process has, without the critic's head."""
    for world in WORLDS:
        said = forks("import sys, test_rl; test_rl.one_of_several(sys.argv[1])", tmp_path, world=world)
        assert "Warning" not in said, said
    for world, (_, methods) in WORLDS.items():
        found, gaps = torch.load(tmp_path / f"{world}.pt")
        for method in methods:
            alone = steps_of(method, max_row_tokens=10_000)
            assert_same(found[method], alone)
            if method == "critic":
                exported = Qwen2.from_pretrained(tmp_path / str(world))
                assert_close(dict(exported.named_parameters()), {
                    name: p.detach() for name, p in alone[2].actor.named_parameters() if "score." not in name})
        assert max(gaps, default=0) < 1e-5 and len(gaps) == (3 if world == 2 else 0)


def test_an_exported_actor_is_an_ordinary_folder(tmp_path):
    """After an update: the same probabilities here and in transformers."""
    trainer = trainer_of(SMALL, SIZE, lr=1e-2, critic_lr=1e-2)
    samples = some_samples(4)
    learn(trainer, samples)
    export_model(trainer.actor, Tokenizer.of_bytes(), tmp_path)
    model = Qwen2.from_pretrained(tmp_path)
    tokens = torch.tensor([samples[0].prompt])
    assert not [name for name, _ in model.named_parameters() if "score" in name]
    with torch.no_grad():
        expected = trainer.actor(tokens)
        assert torch.equal(model(tokens), expected) and Tokenizer.from_pretrained(tmp_path).size == SIZE
        transformers = pytest.importorskip("transformers")
        other = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
        assert torch.allclose(other(tokens).logits, expected, atol=1e-5)


# -- a planted best reply

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
    settings = dict(lr=5e-3, critic_lr=5e-3, epochs=4, kl=0.03, max_new_tokens=3, max_batch=64, context=16, seed=seed)
    trainer = trainer_of(TEN, DIGITS.size, **settings, **method)
    engine = sampling.make_engine(trainer.cfg, trainer.actor, DIGITS)
    before = expected_worth(trainer.actor)
    for iteration in range(iterations):
        groups = engine.generate(QUESTIONS, n=32, max_new_tokens=3, seed=1000 * (100 * seed + iteration))
        replies = [(i, reply) for i, group in enumerate(groups) for reply in group]
        samples = [sample_of(QUESTIONS[i], reply.tokens, worth(i, reply.text, reply.finish == "stop"), reply.logps,
                             group=i, episode_id=j) for j, (i, reply) in enumerate(replies)]
        learn(trainer, samples, iteration, engine)
        if (after := expected_worth(trainer.actor)) >= 0.95:
            break
    return iteration + 1, before, after


@pytest.mark.parametrize("method", METHODS)
def test_the_best_of_ten_replies_is_found(method):
    iterations, before, after = find_best(3, **METHODS[method])
    assert before < 0.05 and after >= 0.95 and iterations < 100


def test_values_of_whole_trajectories_may_move_as_far_as_their_returns_are_large(monkeypatch):
    limits = []
    loss = rl.value_loss
    monkeypatch.setattr(rl, "value_loss", lambda *args: limits.append(args[3]) or loss(*args))
    for settings in ({"rollout": "step"}, {"rollout": "episode", "steps": 7}):
        learn(trainer_of(SMALL, SIZE, **settings), some_samples(2), 1)
    assert limits == pytest.approx([0.2, 1.4])


# -- settings

@pytest.mark.parametrize("bad", [
    {"rollout": "steps"}, {"advantage": "best"}, {"sandbox": "maybe"}, {"dtype": "float64"}, {"iterations": 0},
    {"samples": 0}, {"epochs": 0}, {"temperature": 0.0}, {"max_new_tokens": 0}, {"max_row_tokens": 0}, {"kl": -0.1},
    {"minibatches": 4, "states": 3}, {"advantage": "rloo", "samples": 1}, {"advantage": "grpo", "samples": 1},
    {"lr": -1e-6}, {"critic_lr": float("nan")}, {"clip_low": 1.5},
    {"clip_high": -0.1}, {"lam": -0.1}, {"lam": 1.1},
    {"context": 1024, "max_new_tokens": 1024}])
def test_settings_that_make_no_sense_are_refused_by_name(bad):
    with pytest.raises(ValueError, match="--" + list(bad)[0].replace("_", "-")):
        rl.Settings(**bad)


def test_settings_at_their_limits_are_taken():
    rl.Settings(kl=0, clip_low=1.0, lam=0.0, minibatches=32, lr=0)
    rl.Settings(advantage="rloo", samples=2, rollout="episode")


def test_a_preset_holds_where_no_flag_says_otherwise():
    s = cli.parse(rl.Settings, ["--plan", "--model", "tiny", "--preset", "7b", "--kl", "0.5"], recipes.fill_rl)
    assert (s.lr, s.critic_lr, s.max_batch, s.kl) == (1e-6, 1e-5, 8, 0.5)


def test_a_group_update_leaves_out_states_whose_actions_all_earned_the_same():
    """Their gradient is zero: with them or without, the sum over tokens is the same, and its denominator is not."""
    samples = some_samples(6)
    for one in samples:
        one.step["reward"] = 0.25 if one.group == 0 else one.step["reward"]
    kept = [one for one in samples if one.group != 0]
    found = []
    for learned in (samples, kept):
        trainer = trainer_of(SMALL, SIZE, advantage="rloo", kl=0.0)
        plain = Plain(trainer)
        figures = learn(trainer, learned)
        assert figures["reward"] == pytest.approx(sum(one.reward for one in learned) / len(learned))
        found.append(plain.steps[0])
    assert_close(found[0], found[1], 0)
    trainer = trainer_of(SMALL, SIZE, advantage="rloo", kl=0.0)
    logp_old = trainer.logprobs(trainer.actor, [one.example for one in samples])
    adv, _ = estimate(trainer, samples, logp_old, None, None)
    weights = rl.importance_weights(logp_old, [torch.tensor(one.logp_sampler) for one in samples])
    plain = Plain(trainer)
    trainer.update_actor([one.example for one in samples], logp_old, adv, weights, [list(range(len(samples)))])
    share = sum(len(one.tokens) for one in kept) / sum(len(one.tokens) for one in samples)
    assert_close(scaled(plain.steps[0], 1 / share), found[1], 1e-4)
    learn(trainer_of(SMALL, SIZE, advantage="rloo", kl=0.1), samples)       # here they hold the policy at the reference
    assert all(one.advantage is not None for one in samples)


@pytest.mark.parametrize("name", ["sample", "eval", "sft", "rl"])
def test_every_setting_is_read(name):
    """Outside the class and its checks, in the script or in what it hands its settings to: as s.NAME, or quoted."""
    read = ""
    beside = ("cli", "collection", "distributed", "logs", "miniature", "play", "recipes")
    for path in [f"{name}.py", "env.py", *(f"support/{each}.py" for each in beside)]:
        source = (HERE.parent / path).read_text().splitlines()
        nodes = ast.parse("\n".join(source)).body
        cls = next((node for node in nodes if getattr(node, "name", "") == "Settings"), None)
        if cls:
            read += "\n".join(source[:cls.lineno - 1] + source[cls.end_lineno:])
            fields = [node.target.id for node in cls.body if isinstance(node, ast.AnnAssign)]
        else:
            read += "\n".join(source)
    assert len(fields) >= 5
    holder = r"\b(s|self\.s|cfg|self\.cfg|settings|values)\."
    assert not [field for field in fields if not re.search(rf'{holder}{field}\b|"{field}"', read)]


# -- as a program

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
