"""What a model of transformers computes, with what its routers chose."""


def logits_and_choices(model, tokens_BT, inputs, routers):
    """(logits, what each router chose, layer by layer), as arrays.

    Args:
      inputs: the call's arguments beside the ids.
      routers: how the names of the routers' classes end.
    """
    import torch  # only where parity is tested

    chosen = []

    def keep(module, given, outputs):
        chosen.append(outputs[2].reshape(*tokens_BT.shape, -1).numpy())

    hooks = [m.register_forward_hook(keep) for m in model.modules() if type(m).__name__.endswith(routers)]
    with torch.no_grad():
        logits = model(torch.tensor(tokens_BT), **inputs).logits
    for hook in hooks:
        hook.remove()
    return logits.numpy(), chosen
