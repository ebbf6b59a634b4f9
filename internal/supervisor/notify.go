//go:build linux

package supervisor

import (
	"net"
	"os"
	"slices"
	"strings"

	"github.com/berth-net/berth/internal/sys"
)

// notifySocket is where a generation reports READY=1 (sd_notify(3)).
type notifySocket struct {
	conn  *net.UnixConn
	path  string
	ready chan struct{} // closed at the first READY=1

	members func() ([]int, error) // whose word counts
}

func newNotifySocket(path string, members func() ([]int, error)) (*notifySocket, error) {
	_ = os.Remove(path)
	conn, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Name: path, Net: "unixgram"})
	if err != nil {
		return nil, err
	}
	if err := sys.PassSenders(conn); err != nil {
		conn.Close()
		return nil, err
	}
	// The program may have become another user.
	_ = os.Chmod(path, 0o666)
	n := &notifySocket{conn: conn, path: path, ready: make(chan struct{}), members: members}
	go n.receive()
	return n, nil
}

func (n *notifySocket) receive() {
	buf, oob := make([]byte, 4096), make([]byte, sys.SenderSize)
	told := false
	for {
		size, oobSize, _, _, err := n.conn.ReadMsgUnix(buf, oob)
		if err != nil {
			return
		}
		// Anybody can write to the socket. A helper of berth's own user, such as systemd-notify, may be gone by now.
		pid, uid := sys.Sender(oob[:oobSize])
		if pid == 0 || uid != 0 && uid != os.Geteuid() {
			if pids, err := n.members(); err != nil || !slices.Contains(pids, pid) {
				continue
			}
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
