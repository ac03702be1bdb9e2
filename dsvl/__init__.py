"""The model and data library of DeepSpeed-VisualChat.

It knows tensors, text and images; it knows nothing of Ray, MLflow, YAML or the command line.
Importing the package imports nothing else, so that `dsvl.config` can be read without torch.
"""
