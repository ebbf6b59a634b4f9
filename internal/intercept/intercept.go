// Package intercept lets one process answer the bind(2) and listen(2) calls of others that know nothing of it.
//
// The one to be watched puts a [Filter] on itself before it executes a program, and hands the descriptor that it gets to the watcher,
// over a Unix socket for example. The watcher makes a [Listener] of it and receives each call while its caller waits: it may do the
// work itself on a duplicate of the caller's socket, put another socket in its place, or let the call go on. All children of the
// program are watched as well; when the last is gone, the listener reports io.EOF.
//
// What it is not: a security boundary. A program that wants to can bind unseen, with io_uring for one, or change its memory after
// the watcher read it: a call that goes on reads it anew. So a watcher that cares binds its own copy of the address.
//
// If the watcher dies or closes the listener, waiting calls and all later ones fail with ENOSYS in the program; if it dies between receiving
// and answering while another process holds the descriptor, that caller stays blocked. Keep the process that answers small.
//
// Linux 5.15 or later, on amd64 and arm64, for programs of 32 bits too.
package intercept

// Op is the system call that a program made.
type Op uint8

// The calls that a [Filter] announces.
const (
	Bind Op = iota + 1
	Listen
	Setsockopt
)

// String returns the name of the system call.
func (o Op) String() string {
	switch o {
	case Bind:
		return "bind"
	case Listen:
		return "listen"
	case Setsockopt:
		return "setsockopt"
	}
	return "unknown call"
}
