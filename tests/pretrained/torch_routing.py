"""Runs a transformers model and records the experts that its routers choose."""


def logits_and_choices(model, tokens_BT, inputs, routers):
    """Returns (logits, the experts chosen in each layer), as arrays.

    Args:
      inputs: arguments of the call beside the ids.
      routers: ending of the routers' class names.
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
