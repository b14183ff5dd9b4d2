"""torch's optimizers with the penalty inside, where a step visits every weight anyway.

    opt = pyreg.optim.AdamW(model.parameters(), lr=3e-4, regularizer=reg, mode="prox")

On the CPU, and on a GPU that native CUDA or Triton serves, a step is one sweep: gradient, decay,
moments, the penalty's gradient or proximal step in the optimizer's own metric, its value, and the
number of zeros. Elsewhere it is torch's own step and the penalty's sweep beside it. State,
`state_dict()` and options are torch's.
"""

from .optimizers import SGD, Adagrad, Adam, AdamW, RMSprop

__all__ = ["SGD", "Adagrad", "Adam", "AdamW", "RMSprop"]
