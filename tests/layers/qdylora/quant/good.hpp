#pragma once

#include <qdylora/core/good.hpp>
