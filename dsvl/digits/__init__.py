"""Real images and real small models that stand in for large ones.

scikit-learn's 1,797 handwritten digits become multi-image, multi-round chats (`chats`), and a
ladder of three LLaMA-architecture decoders and one CLIP vision tower is pretrained on them
(`ladder`): all that the quickstart needs to show training, search and inference for real on a
laptop, without a network.
"""
