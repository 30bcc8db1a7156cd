"""Drafts of a reply: which tokens may come next, and how many of them are worth a try.

Replies copy much of what stands in their prompts. What is guessed from there is checked by the model many tokens at a
time, in one pass that takes little longer than for a single token (sample.py: Engine.step).
"""
import math

LONGEST_DRAFT = 32          # tokens of one row
TOKEN_COST = {"cpu": 0.1, "cuda": 0.004}    # of one more in a pass, whose own is 1; constant, as runs can be repeated


class PromptLookup:
    """Guesses how a text goes on: as it did after its last two tokens when they occurred before.

    pos: where in `seq` the token stands that is guessed next, or None. match_len: how many tokens before it equal the
    end of the text, up to LONGEST. counts: [right, made] guesses of all texts for each match_len. acceptance: the same
    of this text alone, where older guesses count less.
    """
    LONGEST = 16
    DECAY = 0.9

    def __init__(self, prompt, counts):
        self.seq = prompt.tolist()
        self.counts = counts
        self.acceptance = [0.0, 0.0]
        bigrams = zip(self.seq, self.seq[1:])
        self.ngram_index = dict(zip(bigrams, range(2, len(self.seq))))      # bigram -> where it was last followed
        self.find()

    def find(self):
        seq = self.seq
        self.pos = self.ngram_index.get(tuple(seq[-2:]))
        self.match_len = 2
        if self.pos is not None:
            longest = min(self.LONGEST, self.pos)
            while self.match_len < longest and seq[self.pos - 1 - self.match_len] == seq[-1 - self.match_len]:
                self.match_len += 1

    def add(self, token):
        right = False
        if self.pos is not None:
            right = self.seq[self.pos] == token
            counts = self.counts[self.match_len]
            counts[0] += right
            counts[1] += 1
            self.acceptance = [self.DECAY * self.acceptance[0] + right, self.DECAY * self.acceptance[1] + 1]
        self.ngram_index[tuple(self.seq[-2:])] = len(self.seq)
        self.seq.append(token)
        if right:       # the copy goes on, wherever else its last bigram occurs
            self.pos += 1
            self.match_len = min(self.LONGEST, self.match_len + 1)
        else:
            self.find()

    def accept_prob(self):
        """Returns the probability that the next guess is right: this text's record, with two guesses like others'."""
        if self.pos is None:
            return 0.0
        right, made = self.counts[self.match_len]
        return (self.acceptance[0] + 2 * right / made) / (self.acceptance[1] + 2)

    def guess(self, length):
        return self.seq[self.pos:self.pos + length] if length else []


def draft_lengths(probs, cost):
    """Returns how many tokens to guess in each row of a pass. probs: for each row, that its next guess is right.

    A token costs `cost` passes, so one pass over n tokens takes 1 + cost * n. Where each guess is right with
    probability p, the j-th adds p^j tokens. It pays if its cost would give fewer otherwise, at the rate of tokens that
    the whole pass has. All that pay raise that rate, so the lengths are found again with it.
    """
    B = len(probs)
    rate = B / (1 + cost * B)
    for _ in range(3):
        least = max(cost * rate, 1e-9)
        lengths = [int(min(LONGEST_DRAFT, math.log(least) / math.log(p))) if p > least else 0 for p in probs]
        tokens = B + sum(p * (1 - p ** k) / (1 - p) for p, k in zip(probs, lengths) if k)
        rate = max(rate, tokens / (1 + cost * (B + sum(lengths))))
    return lengths
