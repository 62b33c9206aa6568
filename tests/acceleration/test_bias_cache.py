"""The bias that an accelerated model keeps is the one of its table."""

import torch

from accelerated import TABLE, either, results, run


@either
def test_the_bias_is_never_stale(pair, assert_agree, monkeypatch, kind):
    model, accelerated = pair(kind, use_shared_rel_pos_bias=True)
    other, _ = pair(kind, use_shared_rel_pos_bias=True)
    built = []
    original = torch.ops.beit_fast.rel_pos_bias
    monkeypatch.setattr(
        torch.ops.beit_fast, "rel_pos_bias", lambda *a: built.append(a) or original(*a)
    )
    images = torch.randn(2, 3, 32, 32)

    def check():
        with torch.no_grad():
            assert_agree(run(accelerated.eval(), images), run(model.eval(), images))

    def both(change):
        for m in (model, accelerated):
            change(m)
        check()

    def tables(m):
        return [p for name, p in m.named_parameters() if name.endswith(TABLE)]

    check()
    assert len(built) == 3  # the shared one, and one per block
    check()
    assert len(built) == 3
    both(lambda m: m.load_state_dict(other.state_dict()))
    assert len(built) == 6

    def step(m):
        optimizer = torch.optim.AdamW(m.parameters(), lr=0.1)
        results(m.train(), images)
        optimizer.step()

    both(step)
    new = [torch.randn_like(t) for t in tables(model)]

    def assign(m):
        for table, values in zip(tables(m), new, strict=True):
            table.data = values.clone()

    both(assign)
    both(lambda m: [t.data.mul_(2) for t in tables(m)])  # no version counter sees this
    both(lambda m: m.double().float())
    with torch.no_grad():
        bf16 = [run(m.bfloat16(), images.bfloat16()) for m in (accelerated, model)]
    torch.testing.assert_close(*bf16, rtol=0.05, atol=0.05)
    assert len({a[0].dtype for a in built}) == 2


def test_a_bias_built_in_inference_mode_serves_a_training_step(pair, assert_agree):
    model, accelerated = pair("timm")
    images = torch.randn(2, 3, 32, 32)
    for m in (model, accelerated):
        for name, parameter in m.named_parameters():
            parameter.requires_grad_(not name.endswith(TABLE))
    with torch.inference_mode():
        run(accelerated, images)
    assert_agree(results(accelerated, images), results(model, images))


def test_a_bias_that_a_hook_writes_into_is_built_again(pair, assert_agree):
    model, accelerated = pair("transformers")
    for m in (model, accelerated):
        bias = m.beit.layers[0].relative_position_bias
        bias.register_forward_hook(lambda module, args, out: out.mul_(0.5))
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        for _ in range(3):
            assert_agree(run(accelerated, images), run(model, images))
