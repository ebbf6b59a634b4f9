//go:build linux

package supervisor

import (
	"net"
	"os"
	"strings"
)

// notifySocket is where a generation reports READY=1 (sd_notify(3)).
type notifySocket struct {
	conn  *net.UnixConn
	path  string
	ready chan struct{} // closed at the first READY=1
}

func newNotifySocket(path string) (*notifySocket, error) {
	_ = os.Remove(path)
	conn, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Name: path, Net: "unixgram"})
	if err != nil {
		return nil, err
	}
	// The program may have become another user.
	_ = os.Chmod(path, 0o666)
	n := &notifySocket{conn: conn, path: path, ready: make(chan struct{})}
	go n.receive()
	return n, nil
}

func (n *notifySocket) receive() {
	buf := make([]byte, 4096)
	told := false
	for {
		size, err := n.conn.Read(buf)
		if err != nil {
			return
		}
		for line := range strings.Lines(string(buf[:size])) {
			if !told && strings.TrimSpace(line) == "READY=1" {
				told = true
				close(n.ready)
			}
		}
	}
}

func (n *notifySocket) Close() {
	n.conn.Close()
	_ = os.Remove(n.path)
}
