// expect: includes Eigen
#pragma once

#include <Eigen/Dense>
