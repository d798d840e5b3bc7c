"""The page over a maker that draws in place of sampling: python tests/page/drawn_page.py, with app.py's options.

While there is a file `hold` in its folder, it stops within the clip after the number that stands there.
"""

import sys
import time
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[2]))

from animatediff.media.video import save_video  # noqa: E402
from animatediff.page import serve  # noqa: E402
from animatediff.page.jobs import Job  # noqa: E402
from animatediff.page.maker import Maker  # noqa: E402
from scripts.app import main  # noqa: E402

HOLD = Path("hold")


class DrawingMaker(Maker):
    made = 0

    def __call__(self, job: Job) -> str:
        job.note = job.note or str(self.output / f"page-{job.id}")
        self.journal.write(job)
        while HOLD.exists() and self.made >= int(HOLD.read_text()):
            job.check()
            time.sleep(0.01)
        job.step(1, 1)
        clip = Path(job.note) / "sample" / "0-a-clip.gif"
        save_video(np.zeros((2, 8, 8, 3), np.uint8), clip, metadata={**job.settings, "prompt": job.title})
        self.made += 1
        return str(clip)


if __name__ == "__main__":
    serve.Maker = DrawingMaker
    main()
