from beit_fast.tokenizer.protocol import Tokenizer


def test_the_dvae_is_a_tokenizer(tiny):
    assert isinstance(tiny, Tokenizer)
    assert (tiny.vocab_size, tiny.stride) == (24, 8)


def test_what_cannot_decode_is_none():
    class Encoder:
        vocab_size, stride = 24, 8

        def encode(self, images):
            return images

    assert not isinstance(Encoder(), Tokenizer)
