"""Take the image tower out of a Qwen-VL checkpoint: `python -m jobs.extract_qwen_vision SOURCE TARGET`."""

import argparse
import sys

from dsvl.qwen_vision import extract


def main(arguments: list[str] | None = None) -> int:
    """0: the target is written; 2: the request is wrong, as one line on stderr says."""
    parser = argparse.ArgumentParser(prog="jobs.extract_qwen_vision", description=__doc__)
    parser.add_argument("source", help="folder of Qwen-VL or Qwen-VL-Chat, as downloaded")
    parser.add_argument("target", help="new folder, to be named in model.vision.checkpoint")
    options = parser.parse_args(arguments)
    try:
        extract(options.source, options.target)
    except (ValueError, FileNotFoundError) as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
