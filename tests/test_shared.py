"""Shared prefixes: texts that begin alike are one tree in a packed row, and all they give is what they give apart."""
import copy
import random

import pytest
import torch

import model as architecture
import rl
import test_rl
from model import Config, Qwen2
from support import distributed, sampling
from support.distributed import pack_trees, packed_rows

SHAPE = Config(vocab_size=300, hidden_size=64, intermediate_size=96, num_hidden_layers=3, num_attention_heads=4,
               num_key_value_heads=2)
NUM_IDS = 290
CPU = torch.device("cpu")


def example(prompt, reply):
    return prompt + reply, [False] * len(prompt) + [True] * len(reply)


def draw_examples(seed, branches=(1, 5, 3), lengths=(1, 30)):
    """Examples of several states: of state i so many actions as branches[i] says, each of 1 to 30 tokens."""
    rng = random.Random(seed)
    examples = []
    for count in branches:
        prompt = [rng.randrange(NUM_IDS) for _ in range(rng.randint(20, 70))]
        for _ in range(count):
            examples.append(example(prompt, [rng.randrange(NUM_IDS) for _ in range(rng.randint(*lengths))]))
    rng.shuffle(examples)
    return examples


def apart(examples):
    """A row for each example."""
    rows = []
    for i in range(len(examples)):
        rows += packed_rows(examples, [i], 0, 1, 10**6)
    return rows


def results_of(model, examples, rows):
    """Log-probs and entropies (or the values of a critic) of each example, and the gradients of a weighted sum of all
    of them, in which no two tokens weigh the same."""
    counts = [sum(loss_mask) for _, loss_mask in examples]
    weights = torch.linspace(-1, 2, sum(counts)).split(counts)
    found = [None] * len(examples)
    model.zero_grad()
    for row in rows:
        tokens, lengths, targets = row.inputs(CPU)
        if isinstance(model, rl.Critic):
            output = model(tokens, lengths, targets)[None]
        else:
            output = torch.stack(model(tokens, lengths=lengths, targets=targets, num_token_ids=NUM_IDS)[:2])
        loss = 0
        for i, part in zip(row.examples, output.split([counts[i] for i in row.examples], dim=1)):
            found[i] = part.detach()
            loss = loss + (part * weights[i]).sum()
        loss.backward()
    return found, {name: p.grad for name, p in model.named_parameters()}


def assert_same(found, expected, tolerance=1e-5):
    for part, other in zip(found[0], expected[0]):
        assert (part - other).abs().max() <= tolerance
    for name, gradient in expected[1].items():
        assert (found[1][name] - gradient).norm() <= tolerance * max(gradient.norm(), 1e-3), name


CASES = {"ragged branches": dict(branches=(1, 5, 3)), "one tree": dict(branches=(6,)),
         "branches of one token": dict(branches=(4, 2), lengths=(1, 1)),
         "texts alone": dict(branches=(1, 1, 1)), "many trees": dict(branches=(2,) * 9)}


@pytest.mark.parametrize("make", [Qwen2, rl.Critic])
@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_trees_give_what_texts_give_apart(case, recompute, make):
    """Log-probs, entropies, values and all gradients, in one row, in rows of 200 tokens, and in another order."""
    model = distributed.build_model(SHAPE, None, CPU, seed=1, make=make)
    if make is rl.Critic:
        test_rl.add_noise(model.score, 0.2)
    examples = draw_examples(3, **CASES[case])
    expected = results_of(model, examples, apart(examples))
    for block in model.model.layers:
        block.recompute = recompute
    order = list(range(len(examples)))
    for indices, limit in ((order, 10**6), (order, 200), (order[::-1], 10**6)):
        rows = packed_rows(examples, indices, 0, 1, limit)
        assert sorted(i for row in rows for i in row.examples) == order
        assert_same(results_of(model, examples, rows), expected)


def test_a_state_is_read_once_for_all_its_actions():
    """Tokens by hand: a state of 40 and actions of 3, 5 and 7 are 39 tokens and branches of 3, 5 and 7, each of which
    begins with the state's last token."""
    state = list(range(100, 140))
    examples = [example(state, [200 + n] * n) for n in (5, 3, 7)]
    row, = packed_rows(examples, [2, 0, 1], 0, 1, 1000)
    assert row.lengths == [(39, [3, 5, 7])] and row.examples == [1, 0, 2]
    expected = state[:39] + [139, 203, 203] + [139, 205, 205, 205, 205] + [139] + [207] * 6
    assert row.tokens == expected
    assert row.targets == [architecture.IGNORE] * 39 + [203] * 3 + [205] * 5 + [207] * 7


def test_what_is_learned_is_never_shared():
    """A text that is learned from its first token on is not shared, though it is the same twice."""
    ids = list(range(60))
    trees = pack_trees([(ids, [False] + [True] * 59)] * 2, [0, 1], 1000)
    assert [tree.num_tokens for tree in trees] == [59, 59]
    half = [False] * 30 + [True] * 30
    tree, = pack_trees([(ids, half)] * 2, [0, 1], 1000)
    assert (tree.prefix, tree.branches) == (29, [30, 30])


def test_the_steps_of_a_trajectory_are_one_text():
    """Each prompt goes on with the prompt and the action before; a trajectory from the same start is a branch."""
    start = list(range(50))
    first = start + [250, 251]
    second = first + [60, 61, 62] + [252]
    other = start + [253]
    examples = [(first, [i >= 50 for i in range(52)]), (second, [i >= 55 for i in range(56)]),
                (other, [False] * 50 + [True])]
    row, = packed_rows(examples, range(3), 0, 1, 1000)
    assert row.lengths == [(49, [6, 1])] and row.examples == [0, 1, 2]
    learned = [target for target in row.targets if target != architecture.IGNORE]
    assert learned == [250, 251, 252, 253]
    model = Qwen2.from_scratch(SHAPE, seed=1)
    assert_same(results_of(model, examples, [row]), results_of(model, examples, apart(examples)))


def test_a_near_neighbour_is_shared_with_and_a_limit_is_kept():
    """States of one task begin alike, but the actions of a state are nearer to each other; a tree that would be longer
    than a row is two trees."""
    head = list(range(30))
    examples = [example(head + [state] * 40, [200 + i] * 9) for state in (100, 101) for i in range(4)]
    trees = pack_trees(examples, range(8), 1000)
    assert [(tree.prefix, tree.branches) for tree in trees] == [(69, [9] * 4)] * 2
    trees = pack_trees(examples, range(8), 69 + 2 * 9)
    assert [(tree.prefix, tree.branches) for tree in trees] == [(69, [9] * 2)] * 4
    alone = pack_trees(examples[:1] + examples[4:5], [0, 1], 1000)
    assert [(tree.prefix, tree.branches) for tree in alone] == [(29, [49, 49])]


def test_the_first_token_of_a_reply_has_its_gradient():
    """A reply of one token in a tree: the derivative of its log-prob by single weights is the difference quotient."""
    model = Qwen2.from_scratch(SHAPE, seed=1).double()
    model.tie()
    state = list(range(100, 130))
    examples = [example(state, [7]), example(state, [8, 9])]
    row, = packed_rows(examples, [0, 1], 0, 1, 1000)
    assert row.lengths == [(29, [1, 2])]

    def first_logp():
        tokens, lengths, targets = row.inputs(CPU)
        return model(tokens, lengths=lengths, targets=targets)[0][0]
    first_logp().backward()
    for name, step in (("model.layers.0.self_attn.v_proj.weight", 1e-5), ("model.layers.2.mlp.up_proj.weight", 1e-5)):
        weight = dict(model.named_parameters())[name]
        place = divmod(int(weight.grad.abs().argmax()), weight.shape[1])
        with torch.no_grad():
            weight[place] += step
            above = first_logp()
            weight[place] -= 2 * step
            below = first_logp()
            weight[place] += step
        quotient = (above - below).item() / (2 * step)
        assert abs(quotient) > 1e-4 and weight.grad[place].item() == pytest.approx(quotient, rel=1e-4)


def plain_varlen(q, k, v, query_ends, key_ends, max_queries, max_keys, window_size, enable_gqa):
    """What torch's varlen_attn computes on CUDA, text by text: causal, the last query at the last key."""
    assert window_size == (-1, 0) and enable_gqa
    outputs = []
    for n in range(len(query_ends) - 1):
        queries = q[query_ends[n]:query_ends[n + 1]]
        keys = slice(key_ends[n], key_ends[n + 1])
        R = len(queries)
        S = len(k[keys])
        assert R <= max_queries and S <= max_keys
        heads = [x.repeat_interleave(q.shape[1] // k.shape[1], dim=1).transpose(0, 1) for x in (k[keys], v[keys])]
        scores = queries.transpose(0, 1) @ heads[0].mT / q.shape[-1] ** 0.5
        unseen = torch.arange(S) > torch.arange(S - R, S)[:, None]
        outputs.append((scores.masked_fill(unseen, -torch.inf).softmax(-1) @ heads[1]).transpose(0, 1))
    return torch.cat(outputs)


def test_one_call_for_all_texts_gives_what_a_product_each_gives(monkeypatch):
    """The way of CUDA: offsets of texts and branches as tensors, keys gathered; a plain stand-in is the kernel."""
    model = Qwen2.from_scratch(SHAPE, seed=1)
    examples = draw_examples(5, branches=(3, 1, 4))
    rows = packed_rows(examples, range(len(examples)), 0, 1, 10**6)
    expected = results_of(model, examples, rows)
    expected = expected[0], copy.deepcopy(expected[1])
    calls = []
    monkeypatch.setattr(architecture, "has_varlen", lambda tokens, dtype: True)
    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", lambda *args, **options: (
        calls.append(1), plain_varlen(*args, **options))[1])
    assert_same(results_of(model, examples, rows), expected)
    assert len(calls) == SHAPE.num_hidden_layers * len(rows)


@pytest.mark.parametrize("method", test_rl.METHODS)
def test_an_iteration_of_ppo_equals_the_packed_one(method, monkeypatch):
    """All gradients and figures, with and without shared prefixes."""
    shared = test_rl.steps_of(method)
    monkeypatch.setattr(distributed, "LEAST_SHARED", 10**9)
    test_rl.assert_same(shared, test_rl.steps_of(method), 1e-5)


def test_rows_on_several_threads_give_the_same_bits():
    """The sum is in the order of the rows, whichever is done first."""
    examples = draw_examples(7, branches=(2,) * 20)
    rows = packed_rows(examples, range(40), 0, 1, 150)
    threads = torch.get_num_threads()
    found = []
    try:
        model = Qwen2.from_scratch(SHAPE, seed=1)
        pool = distributed.row_threads(SHAPE, CPU)
        assert torch.get_num_threads() == 1 and len(rows) > 5
        for workers in (None, pool, pool):
            def loss_of(row):
                tokens, lengths, targets = row.inputs(CPU)
                logp, _, _ = model(tokens, lengths=lengths, targets=targets)
                return -logp.sum(), logp.detach().sum()
            model.zero_grad()
            total = distributed.add_gradients(model, rows, loss_of, workers)
            found.append((total, [p.grad.clone() for p in model.parameters()]))
    finally:
        torch.set_num_threads(threads)
    for total, gradients in found[1:]:
        assert torch.equal(total, found[0][0]) and all(map(torch.equal, gradients, found[0][1]))


def test_a_minibatch_holds_whole_states():
    trainer = test_rl.trainer_of(SHAPE, NUM_IDS, minibatches=3, epochs=2)
    groups = [0, 0, 2, 2, 2, 5, 7, 7]
    batches = trainer.minibatches(groups, iteration=1)
    assert len(batches) == 6
    for batch in (sum(batches[:3], []), sum(batches[3:], [])):
        assert sorted(batch) == list(range(8))      # each pass sees all
    for batch in batches:
        states = {groups[i] for i in batch}
        assert batch == [i for i, group in enumerate(groups) if group in states]
    assert batches[:3] != batches[3:]
    assert len(trainer.minibatches([4, 4], 0)) == 2     # one state: one step in each of two passes


def test_log_probs_of_the_sampler_stand_for_the_old_ones():
    """They are taken as they are, and a share of the states is checked: a sampler that is off by 0.01 there is an
    error, and so is one that gives no number."""
    trainer = test_rl.trainer_of(SHAPE, NUM_IDS)
    examples = [one for seed in range(9) for one in draw_examples(seed, branches=(2,))]
    transitions = [test_rl.sample_of([1], [2], 0.0, group=i // 2) for i in range(18)]
    logp = trainer.logprobs(trainer.actor, examples)

    class Worker:
        def samples_from(self, actor):
            return self.is_actor
    worker = Worker()
    for iteration, checked in ((0, [0, 1, 16, 17]), (3, [6, 7])):
        worker.is_actor = True
        sampled = [values + (1e-4 if i in checked else 1.0) for i, values in enumerate(logp)]
        old, diff = sampling.old_logprobs(worker, trainer, transitions, examples, sampled, iteration)
        assert old is sampled and len(diff) == sum(len(logp[i]) for i in checked)
        assert diff.tolist() == pytest.approx([1e-4] * len(diff), rel=0.1)
        worker.is_actor = False
        old, diff = sampling.old_logprobs(worker, trainer, transitions, examples, sampled, iteration)
        assert all(map(torch.allclose, old, logp)) and diff.max() == pytest.approx(1.0, rel=1e-4)
        worker.is_actor = True
        for wrong in (0.01, torch.nan):
            sampled[checked[-1]] = logp[checked[-1]] + wrong
            with pytest.raises(sampling.RunError, match="log-probs of the sampler and of the trainer differ by"):
                sampling.old_logprobs(worker, trainer, transitions, examples, sampled, iteration)
