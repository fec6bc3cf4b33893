// expect: device code stands in cuda/*.cuh alone
#pragma once

template <class K>
void launch(K kernel) { kernel<<<1, 1>>>(); }
