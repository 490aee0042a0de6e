"""Shared vocabulary: configuration, checks and the glossary of dimensions.

One letter means one thing everywhere: in names (`x_BTD`), annotations (`Float[Array, "B T D"]`) and einsums.

    B  batch                          E  real (FFN) experts
    T  positions of the sequence      V  virtual (zero-cost) experts
    N  tokens, N = B * T              C  router columns, C = E + V; in expert buffers [E, C, D] the
    D  model width                       capacity, the rows one expert's buffer holds
    F  expert FFN width               K  slots per token, the static bound on them in array shapes
    H  query heads                    L  layers (in router arrays: MoE layers only)
    G  key/value heads                M  modalities
    A  head width                     P  image or video patches of a sequence
    S  audio frames of a sequence     R  rows of a flat, expert-major buffer
    X  features of a patch or frame   Y  vocabulary entries (tokenizer ids)
    Z  a hypernetwork's code          Q  rank of the maps a hypernetwork generates
    U  a latent of attention          W  width of a head's values, where it is not A
    I  windows of sounds              O  chunks of a window of sound

Terms: `importance` w in (0, 1), one per token and layer; `slots` K_i, which a token splits into `real_slots` and
`virtual_slots`; `capacity_factor`, `dispatch`, `combine`, `load` as in the mixture-of-experts literature; `dropped`,
slots that exceed an expert's capacity; `segment`, one of the examples packed into a row; `item`, one picture, video or
sound in a row; `window`, the pair (k_min, k_max); `budget`, the average number of real slots per token.

docs/glossary.md has the same as a table, with the other terms of the field.
"""
