"""The tokenizer of the model with a million weights, which is learned from its own training conversations."""
import tokenizers

from sample import Tokenizer, byte_alphabet

# A digit is always a token of its own, and a word is the same tokens after any punctuation.
# Both make it easier for a small model to learn to copy.
WORDS = r" ?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"


def train_tokenizer(texts, size, phrases=()):
    """Return a Tokenizer of `size` ids that is learned from the texts. It has no default system message.

    Each of `phrases` gets one more id, wherever it stands: it is what many replies have word for word.
    """
    pre_tokenizers = tokenizers.pre_tokenizers
    bpe = tokenizers.Tokenizer(tokenizers.models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(tokenizers.Regex(WORDS), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    bpe.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=[Tokenizer.TEXT_END, Tokenizer.TURN, Tokenizer.END],
        initial_alphabet=byte_alphabet(),
        show_progress=False)
    bpe.train_from_iterator(texts, trainer)
    bpe.add_tokens([tokenizers.AddedToken(phrase, normalized=False) for phrase in phrases])
    return Tokenizer(bpe, system=None)
