// Package drain ends a generation's connections without cutting a request.
//
// When new connections go to the next generation, a [Drainer] watches the old one's. While a request is in flight on a connection,
// it waits. In a moment when nothing is, it makes the program read an end of file (SHUT_RD on a duplicate of the program's own
// descriptor), as if the client had gone; the program closes, and the client sees an idle connection end. After that the
// program can be stopped.
//
// From outside, "nothing is in flight" is a judgement. It rests on the order of the last payload in and out: an [Order] knows it exactly,
// from BPF programs on the generation's cgroup. Without it the connections' counters must do, which are read every millisecond and show
// the order only sometimes; where they don't, the Drainer takes its time. It can't judge a protocol with several requests
// at once on one connection (HTTP/2, pipelining): there, an answer to one request hides that another waits.
package drain
