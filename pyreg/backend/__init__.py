"""Who runs a sweep. One class each, with the same verbs; imported when first needed.

A backend has

- `name`; `missing()`: why it cannot be used at all, or None; `version()`: for `pyreg doctor`;
- `refuses(pack, by_name)`: why it cannot (or, unless asked for by name, should not) sweep this
  pack, or None;
- `check(pack, tensors)`: raises StaleLayout if the tensors are not what the pack recorded;
- the sweeps, over `tensors` = the pack's rows and `rules` = the penalties, in the order of
  `pack.penalties`. Each may raise StaleLayout, before anything is written:

  - `value(pack, tensors, rules) -> (value, sums)`: 0-dim float64, or float32 where no tensor is
    float64; [rules, strengths] derivatives by the strengths (whatever torch.py's `taken` takes);
  - `gradient(pack, tensors, grads, rules, scale)`: grads[i] = scale * gradient, None left out;
  - `accumulate(pack, tensors, rules, scale) -> (value, of_rules, present)`: .grad += scale *
    gradient where there is one; how many there were; [rules] each rule's value, as above;
  - `prox(pack, tensors, rules, step)`: in place;
  - `prox_in_metric(pack, tensors, metrics, rules) -> (value, of_rules)`: in place, with a step of
    its own for each element; the values of the new weights;
  - `stats(pack, tensors)`: [rows, 5] float64, the columns of `reference.stats`.

A backend that can take an optimizer's step in one sweep has `step` too; `steps(pack)` says whether
it can with the pack's penalties.
"""
