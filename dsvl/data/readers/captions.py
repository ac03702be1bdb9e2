"""Ways to ask for a caption; ours, as the length and style that they ask for are those of the answers."""

SHORT = (
    "What is in this picture? Answer in one sentence.",
    "Sum up the picture in a single sentence.",
    "Give this image a one-line caption.",
    "In a few words, what can be seen here?",
    "Write one short sentence about what this image shows.",
    "How would you caption this picture, briefly?",
    "State the main content of the image in one line.",
    "Tell me in brief what is going on in this picture.",
)
"""For captions of a sentence, as COCO has them."""

LONG = (
    "Describe this picture in detail.",
    "What does this image show? Go into detail.",
    "Write a paragraph about what can be seen here.",
    "Walk me through everything that you notice in this image.",
    "Give a thorough account of this picture.",
    "Please describe the scene, its objects and its mood.",
    "Tell me all about this image.",
    "How would you describe this picture to someone who cannot see it?",
)
"""For captions of a paragraph, as MiniGPT-4 has them."""
