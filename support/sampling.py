"""The engine that rl.py samples with: its copy of the actor's weights, and whether it gives the trainer's log-probs."""
import torch
from torch.distributed.tensor import DTensor

import sample
from model import Qwen2
from support.cli import RunError
from support.distributed import copy_weights

CHECK_EVERY = 8             # of so many states one is checked: the log-probs of sampler and trainer must agree ...
MAX_LOGP_DIFF = 1e-3        # ... within this


def make_engine(cfg, actor, tokenizer):
    """Returns an Engine of the actor, or of a copy where it is sharded or does not compute in its weights' dtype."""
    model = actor
    if any(isinstance(p, DTensor) or p.dtype is not actor.compute_dtype for p in actor.parameters()):
        device = next(actor.parameters()).device
        model = Qwen2.uninitialized(actor.config, actor.compute_dtype, device).requires_grad_(False)
        copy_weights(actor, model)
    return sample.Engine(model, tokenizer, cfg.max_batch, cfg.context, name=cfg.model)


def old_logprobs(worker, trainer, transitions, examples, logp_sampler, iteration):
    """Returns the actor's log-probs of the examples before the update, per token, and how far those of the sampler are
    from the trainer's, (N,). Where the sampler is the actor itself, its log-probs are the old ones, and a share of the
    states is checked. RunError: they differ."""
    if not worker.samples_from(trainer.actor):
        logp_old = trainer.logprobs(trainer.actor, examples)
        return logp_old, (torch.cat(logp_old) - torch.cat(logp_sampler)).abs()
    checked = [i for i, transition in enumerate(transitions) if (transition.group - iteration) % CHECK_EVERY == 0]
    checked = checked or range(len(examples))
    logp = trainer.logprobs(trainer.actor, examples, checked)
    diff = (torch.cat(logp) - torch.cat([logp_sampler[i] for i in checked])).abs()
    if not diff.max() < MAX_LOGP_DIFF:
        raise RunError(f"log-probs of the sampler and of the trainer differ by {diff.max():.2g}, though their weights "
                       "are the same")
    return logp_sampler, diff
