"""scikit-learn's 1,797 handwritten digits (UCI, 8x8, 17 gray levels) as a TFDS data set, prepared offline."""

import numpy as np
import tensorflow_datasets as tfds
from PIL import Image


class Digits(tfds.core.GeneratorBasedBuilder):
    """Real handwritten digits that need no download: the data are part of scikit-learn."""

    VERSION = tfds.core.Version("1.0.0")
    pkg_dir_path = None  # no metadata folder beside this file

    def _info(self):
        return tfds.core.DatasetInfo(
            builder=self,
            description=self.__doc__,
            features=tfds.features.FeaturesDict(
                {
                    "image": tfds.features.Image(shape=(8, 8, 1)),
                    "label": tfds.features.ClassLabel(num_classes=10),
                }
            ),
            supervised_keys=("image", "label"),
            homepage="https://archive.ics.uci.edu/dataset/80",
        )

    def _split_generators(self, dl_manager):
        return {"train": self._generate_examples()}

    def _generate_examples(self):
        from sklearn.datasets import load_digits  # takes a second, and only the first run needs it

        digits = load_digits()
        levels = np.round(digits.images * 255 / 16).astype(np.uint8)
        for i, (image, label) in enumerate(zip(levels, digits.target, strict=True)):
            yield i, {"image": Image.fromarray(image), "label": int(label)}
