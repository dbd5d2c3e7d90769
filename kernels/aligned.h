/* For the code around a compiled step: what it asks malloc for begins with a page. That is the memory of its weights,
 * which malloc puts 16 bytes behind one, so that every vector and every row of a tile would lie in two lines of the cache.
 */
#include <cstdlib>
namespace std {
using ::valloc;
}
#define malloc valloc
