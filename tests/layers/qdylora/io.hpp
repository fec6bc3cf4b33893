#pragma once

#include <qdylora/io/good.hpp>
#include <qdylora/qdylora.hpp>
