"""What Lightning needs from us.

- `base`: the base of the LightningModules: inputs, optimiser and schedule, what is logged
- `fine_tuning`: what Classifier, Segmenter and Detector share; `mixing`: mixup and cutmix
- `kernels`, `strategies`, `xla`: devices, sharding, TPUs
- `inner_runs`: a training within another command
"""
