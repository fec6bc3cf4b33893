"""Reads the .npy files of a folder that qdylora wrote, compares them with what they must hold (names say shape and type; element i is i - 5
in float types, 3 i in others), and writes arrays for it to read."""
import pathlib
import sys

import numpy as np

folder = pathlib.Path(sys.argv[1])
written = sorted(folder.glob("ours_*.npy"))
assert len(written) == 24, written
for path in written:
    _, type_name, dims = path.stem.split("_")
    shape = tuple(int(n) for n in dims.split("x")) if dims else ()
    array = np.load(path, allow_pickle=False)
    values = np.arange(int(np.prod(shape)))
    expected = (values - 5 if type_name.startswith("f") else 3 * values).astype(np.dtype(type_name)).reshape(shape)
    assert array.dtype == expected.dtype and array.dtype.isnative, (path, array.dtype)
    assert array.shape == shape and array.flags.c_contiguous, (path, array.shape)
    assert np.array_equal(array, expected), path
    np.save(folder / f"theirs_{type_name}_{dims}.npy", expected)
print(f"numpy {np.__version__} read {len(written)} arrays")
