// Long because the self-test wants one that says so.
#pragma once












