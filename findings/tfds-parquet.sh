#!/usr/bin/env bash
# Versions: tensorflow-datasets 4.9.10, pyarrow 26.0.1, array_record 0.8.6, importlib_resources 7.1.0, without
# TensorFlow.
#
# Behaviour: a data set of 1,000 examples written with file_format="parquet" is prepared without complaint, its info
# says 1,000, and its data source has 400; index 400 raises IndexError. With "array_record" all 1,000 are there.
#
# Why it defeats a good guess: parquet is one of the formats on offer, and the only one besides array_record that
# reads without TensorFlow. A training loop that asks the source for its length trains on two fifths of the data and
# reports nothing; the count in the metadata, which one would check, is right.
#
# Do instead: file_format="array_record", and compare len(source) with info.splits[name].num_examples.
#
# Output seen:
#   parquet: info 1000, source 400, distinct examples read 400; array_record: info 1000, source 1000, read 1000
set -euo pipefail
python=${PYTHON:-python3}
"$python" -c 'import sys; sys.exit("Python 3.11 or newer is needed" if sys.version_info < (3, 11) else 0)'
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"$python" -m venv "$folder"
"$folder/bin/pip" install --quiet \
    tensorflow-datasets==4.9.10 pyarrow==26.0.1 array_record==0.8.6 importlib_resources==7.1.0 numpy==2.4.6
"$folder/bin/python" -I -W ignore - <<'EOF'
import logging
import sys
import tempfile

import numpy as np
import tensorflow_datasets as tfds

logging.disable(logging.ERROR)
tfds.disable_progress_bar()


class Numbers(tfds.core.GeneratorBasedBuilder):
    VERSION = tfds.core.Version("1.0.0")

    def _info(self):
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict({"number": np.int64}))

    def _split_generators(self, _):
        return {"train": ((i, {"number": i}) for i in range(1000))}

    def _generate_examples(self):
        raise NotImplementedError


def counts(file_format):
    with tempfile.TemporaryDirectory() as folder:
        builder = Numbers(data_dir=folder, file_format=file_format)
        builder.download_and_prepare()
        source = builder.as_data_source("train")
        read = {int(source[i]["number"]) for i in range(len(source))}
        return builder.info.splits["train"].num_examples, len(source), len(read)


parquet, array_record = counts("parquet"), counts("array_record")
print(f"tensorflow-datasets {tfds.__version__}: examples by the info, in the source, read")
print(f"parquet {parquet}, array_record {array_record}")
held = parquet == (1000, 400, 400) and array_record == (1000, 1000, 1000)
sys.exit(0 if held else "no longer as described at the top of this script")
EOF
